// What these kernels were compiled for, and how fast this machine reads: the bound of everything that meets each weight once.
#include "api.h"
#include "pool.h"
#include "simd.h"

using namespace dsv4;

DSV4_API const char* dsv4_instructions() {
#if DSV4_AVX2 && defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return "AVX-512 VNNI";
#elif DSV4_VNNI
    return "AVX2 with VNNI";
#elif DSV4_AVX2
    return "AVX2";
#elif DSV4_NEON
    return "NEON";
#else
    return "portable";
#endif
}

// Reads `bytes` bytes (a multiple of 64) with all threads; the sum keeps the compiler from leaving it out.
DSV4_API void dsv4_read(const uint8_t* from, int64_t bytes, int64_t* total) {
    int64_t sums[256] = {};
    parallel(bytes, int64_t(1) << 22, [&](int64_t begin, int64_t end) {
        u64x4 low = {}, high = {};
        for (int64_t at = begin; at < end; at += 64) {
            low += load<u64x4>(from + at);
            high += load<u64x4>(from + at + 32);
        }
        low += high;
        sums[thread_index() & 255] += int64_t(low[0] + low[1] + low[2] + low[3]);
    });
    *total = 0;
    for (int64_t sum : sums) *total += sum;
}
