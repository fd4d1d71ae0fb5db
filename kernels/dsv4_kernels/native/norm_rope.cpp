// Norms of rows and the rotation of pairs at their end.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "pool.h"
#include "queue.h"
#include "steps.h"

using namespace dsv4;

namespace {

constexpr int64_t GRAIN = int64_t(1) << 15;  // values that one thread goes through sooner than two

void rms_norm(const float* x, const float* weight, int64_t rows, int64_t d, float eps, float* out) {
    parallel(rows, items_for(GRAIN, d), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            norm_row(x + row * d, weight, d, eps, out + row * d);
    });
}

void rotate(const float* x, const float* turns, int64_t t, int64_t heads, int64_t d, int64_t pairs, int64_t inverse,
            float* out) {
    int64_t still = d - 2 * pairs;
    float sign = inverse ? -1.0f : 1.0f;
    parallel(t * heads, items_for(GRAIN, d), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            std::memcpy(out + row * d, x + row * d, size_t(d) * sizeof(float));
            turn_pairs(out + row * d + still, turns + row / heads * 2 * pairs, pairs, sign);
        }
    });
}

void norm_rotate(const float* x, const float* weight, float eps, const float* turns, int64_t t, int64_t heads, int64_t d,
                 int64_t pairs, float* out) {
    parallel(t * heads, items_for(GRAIN, d), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            float* to = out + row * d;
            norm_row(x + row * d, weight, d, eps, to);
            turn_pairs(to + d - 2 * pairs, turns + row / heads * 2 * pairs, pairs, 1.0f);
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

// Both: x [t, heads, d], weight [d] or null -> out like x, normed, then turned.
DSV4_API void dsv4_norm_rotate(const float* x, const float* weight, float eps, const float* turns, int64_t t, int64_t heads,
                               int64_t d, int64_t pairs, float* out) {
    submit([=] { norm_rotate(x, weight, eps, turns, t, heads, d, pairs, out); });
}
