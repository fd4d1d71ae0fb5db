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

// Cosine and sine of a position's angles: products of float32 factors, as in ref.py, whatever that costs in accuracy.
void turns_of(int64_t position, const float* freqs, int64_t pairs, float* turns) {
    for (int64_t i = 0; i < pairs; ++i) {
        float angle = float(position) * freqs[i];
        turns[2 * i] = std::cos(angle);
        turns[2 * i + 1] = std::sin(angle);
    }
}

void turns_of_all(const int64_t* positions, int64_t t, const float* freqs, int64_t pairs, float* turns) {
    parallel(t, items_for(GRAIN / 16, pairs), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) turns_of(positions[i], freqs, pairs, turns + i * 2 * pairs);
    });
}

struct Place {
    static constexpr int64_t MOST = 4;  // ratios

    const int64_t* at;
    const float *window_freqs, *compress_freqs;
    int64_t pairs, window, count, ratios[MOST];
    float* turns;      // [2 + count, pairs]: in layers of a window alone, in the others, of the first token of each group
    int64_t* numbers;  // [1 + 2 * count]: row of the ring, then of each ratio how many groups are full and which the token's is
};

void place_token(const Place& p) {
    int64_t at = *p.at;
    turns_of(at, p.window_freqs, p.pairs, p.turns);
    turns_of(at, p.compress_freqs, p.pairs, p.turns + 2 * p.pairs);
    p.numbers[0] = at % p.window;
    for (int64_t i = 0; i < p.count; ++i) {
        int64_t ratio = p.ratios[i];
        turns_of(at / ratio * ratio, p.compress_freqs, p.pairs, p.turns + (2 + i) * 2 * p.pairs);
        p.numbers[1 + 2 * i] = (at + 1) / ratio;
        p.numbers[2 + 2 * i] = at / ratio;
    }
}

}  // namespace

// positions [t], freqs [pairs] -> turns [t, pairs] of cosine and sine.
DSV4_API void dsv4_turns(const int64_t* positions, int64_t t, const float* freqs, int64_t pairs, float* turns) {
    submit([=] { turns_of_all(positions, t, freqs, pairs, turns); });
}

// What the position at `at` decides (a struct Place; count at most 4) -> turns [2 + count, pairs] of cosine and sine, numbers
// [1 + 2 * count].
DSV4_API void dsv4_place_token(const int64_t* at, const float* window_freqs, const float* compress_freqs, int64_t pairs,
                               int64_t window, const int64_t* ratios, int64_t count, float* turns, int64_t* numbers) {
    Place place{at, window_freqs, compress_freqs, pairs, window, count, {}, turns, numbers};
    std::copy_n(ratios, count, place.ratios);
    submit([=] { place_token(place); });
}

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
