// Rows of floats of any length, eight values at a time; the last few come as a vector that ends in zeros.
#pragma once

#include "simd.h"

namespace dsv4 {

struct Whole {};
struct Part {
    int64_t count;
};

DSV4_INLINE f32x8 load(const float* from, Whole) { return load<f32x8>(from); }
DSV4_INLINE f32x8 load(const float* from, Part part) {
    f32x8 v = {};
    std::memcpy(&v, from, size_t(part.count) * sizeof(float));
    return v;
}

DSV4_INLINE void store(float* to, f32x8 v, Whole) { store(to, v); }
DSV4_INLINE void store(float* to, f32x8 v, Part part) { std::memcpy(to, &v, size_t(part.count) * sizeof(float)); }

// f(i, Whole or Part) for i = 0, 8, ... below n.
template <class F>
DSV4_INLINE void by_eights(int64_t n, F&& f) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) f(i, Whole{});
    if (i < n) f(i, Part{n - i});
}

// Four sums at once: a single one would have to wait for itself.
inline float sum_of_squares(const float* x, int64_t n) {
    f32x8 sums[4] = {};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 4; ++j) {
            f32x8 v = load<f32x8>(x + i + 8 * j);
            sums[j] = fma(v, v, sums[j]);
        }
    by_eights(n - i, [&](int64_t j, auto part) {
        f32x8 v = load(x + i + j, part);
        sums[0] = fma(v, v, sums[0]);
    });
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace dsv4
