// Activations rounded to bytes, 32 at a time.
#include "aligned.h"
#include "pool.h"
#include "simd.h"
#include "weight.h"

namespace dsv4 {
namespace {

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded number in the low bits

struct Memory {
    Aligned<int8_t> q, lanes;
    Aligned<float> d, sum16, sum32;
    Aligned<int32_t> offsets, first_offsets;
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

// Block k among rows in the order of lanes: four of its values in each of eight vectors.
DSV4_INLINE void place_in_lanes(i8x32 v, int64_t k, int8_t* rows) {
    int8_t* first = rows + k / 8 * 256 + k % 8 * 4;
    for (int p = 0; p < 8; ++p) std::memcpy(first + 32 * p, reinterpret_cast<const char*>(&v) + 4 * p, 4);
}

DSV4_INLINE i8x32 ordered(i8x32 v, Order order) {
    constexpr i8x32 EVENS = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                             1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    constexpr i8x32 EIGHTHS = {0, 8, 16, 24, 1, 9,  17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
                               4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31};
    return order == Order::SPLIT ? __builtin_shuffle(v, EVENS) : order == Order::PLANES ? __builtin_shuffle(v, EIGHTHS) : v;
}

DSV4_INLINE int sum_of_16(const int8_t* q) {
    int sum = 0;
    for (int i = 0; i < 16; ++i) sum += q[i];
    return sum;
}

}  // namespace

Activations rounded(const float* x, int64_t count, int64_t cols, Wants wants, int slot) {
    if (!wants.bytes) return {x, cols};
    Memory& memory = memories[slot];
    int64_t blocks = cols / 32, padded = 8 * whole_groups(cols);
    size_t most = size_t(count * padded);
    bool planes = wants.order == Order::PLANES, many = count > FEW && !planes;
    if (memory.d.size() < most) {
        memory.q.resize(most * 32);
        memory.d.resize(most);
        memory.sum16.resize(most * 2);
        memory.sum32.resize(most);
        memory.offsets.resize(most);
    }
    if (many && memory.first_offsets.size() < most) {
        memory.lanes.resize(most * 32);
        memory.first_offsets.resize(most);
    }
    int8_t *q = memory.q.data(), *lanes = planes ? q : memory.lanes.data();
    float *d = memory.d.data(), *sum16 = memory.sum16.data(), *sum32 = memory.sum32.data();
    int32_t *offsets = memory.offsets.data(), *first_offsets = memory.first_offsets.data();
    parallel(count * blocks, 1024, [=](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            int64_t k = b / blocks * padded + b % blocks;
            alignas(32) int8_t values[32];
            d[k] = round_block(x + 32 * b, values);
            i8x32 v = ordered(load<i8x32>(values), wants.order);
            if (!planes) store(q + 32 * b, v);
            if (planes || many) place_in_lanes(v, k, lanes);
            if (!wants.sums && !planes && !many) continue;
            int low = sum_of_16(values), high = sum_of_16(values + 16);
            offsets[k] = -128 * (low + high);
            if (many) first_offsets[k] = -128 * low;
            if (!wants.sums) continue;
            sum16[2 * b] = d[k] * float(low);
            sum16[2 * b + 1] = d[k] * float(high);
            sum32[b] = d[k] * float(low + high);
        }
    });
    for (int64_t row = 0; many && blocks < padded && row < count; ++row)
        for (int64_t k = row * padded + blocks; k < (row + 1) * padded; ++k) {
            place_in_lanes(i8x32{}, k, lanes);
            d[k] = 0.0f;
            offsets[k] = first_offsets[k] = 0;
        }
    return {x, cols, q, planes || many ? lanes : nullptr, d, sum16, sum32, offsets, first_offsets};
}

}  // namespace dsv4
