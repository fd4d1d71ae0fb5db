// Activations rounded to bytes, 32 at a time.
#include <vector>

#include "pool.h"
#include "simd.h"
#include "weight.h"

namespace dsv4 {
namespace {

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded number in the low bits

struct Memory {
    std::vector<int8_t> q;
    std::vector<float> d, sum16, sum32;
};

thread_local Memory memories[2];

// One block; returns its scale. The greatest magnitude is found among the bits, so that NaN and infinity count as great.
DSV4_INLINE float round_block(const float* x, int8_t* q, bool split) {
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
    int8_t codes[32];
    for (int i = 0; i < 4; ++i) {
        i32x8 whole = bits<i32x8>(v[i] * inverse + splat(MAGIC)) - bits<int32_t>(MAGIC);
        store(codes + 8 * i, __builtin_convertvector(whole, i8x8));
    }
    if (split)
        for (int i = 0; i < 16; ++i) {
            q[i] = codes[2 * i];
            q[16 + i] = codes[2 * i + 1];
        }
    else
        std::memcpy(q, codes, 32);
    return d;
}

DSV4_INLINE int sum_of_16(const int8_t* q) {
    int sum = 0;
    for (int i = 0; i < 16; ++i) sum += q[i];
    return sum;
}

}  // namespace

Activations rounded(const float* x, int64_t count, int64_t cols, Wants wants, int slot) {
    if (!wants.bytes) return {x, cols, nullptr, nullptr, nullptr, nullptr};
    Memory& memory = memories[slot];
    size_t blocks = size_t(count * cols / 32);
    if (memory.d.size() < blocks) {
        memory.q.resize(blocks * 32);
        memory.d.resize(blocks);
        memory.sum16.resize(blocks * 2);
        memory.sum32.resize(blocks);
    }
    int8_t* q = memory.q.data();
    float *d = memory.d.data(), *sum16 = memory.sum16.data(), *sum32 = memory.sum32.data();
    parallel(int64_t(blocks), 1024, [=](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            d[b] = round_block(x + 32 * b, q + 32 * b, wants.split);
            if (!wants.sums) continue;
            int low = sum_of_16(q + 32 * b), high = sum_of_16(q + 32 * b + 16);
            sum16[2 * b] = d[b] * float(low);
            sum16[2 * b + 1] = d[b] * float(high);
            sum32[b] = d[b] * float(low + high);
        }
    });
    return {x, cols, q, d, sum16, sum32};
}

}  // namespace dsv4
