// Activations rounded to bytes, 32 at a time.
#include "aligned.h"
#include "pool.h"
#include "simd.h"
#include "weight.h"

namespace dsv4 {
namespace {

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded number in the low bits

struct Memory {
    Aligned<int8_t> q;
    Aligned<float> d, sum16, sum32;
    Aligned<int32_t> offsets;
};

thread_local Memory memories[2];

// One block, as its values come; returns its scale. The greatest magnitude is found among the bits, so that NaN and infinity count as great.
DSV4_INLINE float round_block(const float* x, int8_t* q) {
    f32x8 v[4];
    i32x8 most = {};
    for (int i = 0; i < 4; ++i) {
        v[i] = load<f32x8>(x + 8 * i);
        i32x8 size = bits<i32x8>(v[i]) & 0x7fffffff;
        most = size > most ? size : most;
    }
    int32_t greatest = 0;
    for (int i = 0; i < 8; ++i) greatest = most[i] > greatest ? most[i] : greatest;
    float d = bits<float>(greatest) / 127.0f;
    f32x8 inverse = splat(d > 1e-37f ? 1.0f / d : 0.0f);
    for (int i = 0; i < 4; ++i) {
        i32x8 whole = bits<i32x8>(v[i] * inverse + splat(MAGIC)) - bits<int32_t>(MAGIC);
        store(q + 8 * i, __builtin_convertvector(whole, i8x8));
    }
    return d;
}

// The 32 values of block `number` of a row that begins at `row`.
DSV4_INLINE void place(const int8_t* values, Order order, int64_t number, int8_t* row) {
    i8x32 v = load<i8x32>(values);
    if (order == Order::PLANES) {  // four values of this block in each of eight planes
        constexpr i8x32 EIGHTHS = {0, 8, 16, 24, 1, 9,  17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
                                   4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31};
        v = __builtin_shuffle(v, EIGHTHS);
        int8_t* first = row + number / 8 * 256 + number % 8 * 4;
        for (int p = 0; p < 8; ++p) std::memcpy(first + 32 * p, reinterpret_cast<const char*>(&v) + 4 * p, 4);
        return;
    }
    constexpr i8x32 EVENS = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                             1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    store(row + 32 * number, order == Order::SPLIT ? __builtin_shuffle(v, EVENS) : v);
}

DSV4_INLINE int sum_of_16(const int8_t* q) {
    int sum = 0;
    for (int i = 0; i < 16; ++i) sum += q[i];
    return sum;
}

}  // namespace

Activations rounded(const float* x, int64_t count, int64_t cols, Wants wants, int slot) {
    if (!wants.bytes) return {x, cols, nullptr, nullptr, nullptr, nullptr, nullptr};
    Memory& memory = memories[slot];
    size_t blocks = size_t(count * cols / 32);
    if (memory.d.size() < blocks) {
        memory.q.resize(blocks * 32);
        memory.d.resize(blocks);
        memory.sum16.resize(blocks * 2);
        memory.sum32.resize(blocks);
        memory.offsets.resize(blocks);
    }
    int8_t* q = memory.q.data();
    float *d = memory.d.data(), *sum16 = memory.sum16.data(), *sum32 = memory.sum32.data();
    int32_t* offsets = memory.offsets.data();
    parallel(int64_t(blocks), 1024, [=](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            int8_t values[32];
            d[b] = round_block(x + 32 * b, values);
            place(values, wants.order, b % (cols / 32), q + b / (cols / 32) * cols);
            if (wants.order == Order::PLANES) offsets[b] = -128 * (sum_of_16(values) + sum_of_16(values + 16));
            if (!wants.sums) continue;
            int low = sum_of_16(values), high = sum_of_16(values + 16);
            sum16[2 * b] = d[b] * float(low);
            sum16[2 * b + 1] = d[b] * float(high);
            sum32[b] = d[b] * float(low + high);
        }
    });
    return {x, cols, q, d, sum16, sum32, offsets};
}

}  // namespace dsv4
