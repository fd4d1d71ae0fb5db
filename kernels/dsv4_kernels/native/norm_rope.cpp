// Norms of rows and the rotation of pairs at their end.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "pool.h"
#include "queue.h"
#include "rows.h"

using namespace dsv4;

namespace {

constexpr int64_t GRAIN = int64_t(1) << 15;  // values that one thread goes through sooner than two

void rms_norm(const float* x, const float* weight, int64_t rows, int64_t d, float eps, float* out) {
    parallel(rows, items_for(GRAIN, d), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const float* from = x + row * d;
            float* to = out + row * d;
            f32x8 factor = splat(1.0f / std::sqrt(sum_of_squares(from, d) / float(d) + eps));
            if (weight)
                by_eights(d, [&](int64_t i, auto part) {
                    store(to + i, load(from + i, part) * factor * load(weight + i, part), part);
                });
            else
                by_eights(d, [&](int64_t i, auto part) { store(to + i, load(from + i, part) * factor, part); });
        }
    });
}

void rotate(const float* x, const float* turns, int64_t t, int64_t heads, int64_t d, int64_t pairs, int64_t inverse,
            float* out) {
    int64_t still = d - 2 * pairs;
    float sign = inverse ? -1.0f : 1.0f;
    parallel(t * heads, items_for(GRAIN, d), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const float *from = x + row * d, *turn = turns + row / heads * 2 * pairs;
            float* to = out + row * d;
            std::memcpy(to, from, size_t(still) * sizeof(float));
            from += still;
            to += still;
#pragma omp simd
            for (int64_t i = 0; i < pairs; ++i) {
                float a = from[2 * i], b = from[2 * i + 1], c = turn[2 * i], s = sign * turn[2 * i + 1];
                to[2 * i] = a * c - b * s;
                to[2 * i + 1] = a * s + b * c;
            }
        }
    });
}

}  // namespace

// x [rows, d], weight [d] or null -> out [rows, d].
DSV4_API void dsv4_rms_norm(const float* x, const float* weight, int64_t rows, int64_t d, float eps, float* out) {
    submit([=] { rms_norm(x, weight, rows, d, eps, out); });
}

// x [t, heads, d], turns [t, pairs] of cosine and sine -> out like x, the last 2 * pairs values of each row turned; the other
// way round with `inverse`.
DSV4_API void dsv4_rotate(const float* x, const float* turns, int64_t t, int64_t heads, int64_t d, int64_t pairs, int64_t inverse,
                          float* out) {
    submit([=] { rotate(x, turns, t, heads, d, pairs, inverse, out); });
}
