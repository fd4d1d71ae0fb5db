// Attention of each query over the keys that it sees, which are its values too. All heads share them, so four heads go through
// the keys together: a key is widened once for four products.
#include <algorithm>
#include <vector>

#include "aligned.h"
#include "api.h"
#include "floats.h"
#include "pool.h"
#include "queue.h"
#include "steps.h"

using namespace dsv4;

namespace {

constexpr int HEADS = 4;       // that go together
constexpr int64_t KEYS = 64;   // that are gathered together
constexpr int WIDE = REGISTERS >= 32 ? 4 : 2;  // keys that are scored, or vectors of a key that are gathered, at once

struct Problem {
    const float* q;  // [t, heads, d]
    int64_t t, heads, d;
    const uint8_t* recent;  // [rows, d]
    int64_t rows;
    const uint8_t* entries;  // [n, d]
    int64_t n;
    const int64_t *visible, *chosen;  // [t], [t, k]
    int64_t k;
    const float* sink;
    int64_t window;
    const float* turns;  // [t, pairs] that the result is turned back by, or null
    int64_t pairs;
    const int64_t* at;  // the only token's position, or null
    float* out;

    // Rows of `recent` that hold keys. A ring's are those of positions up to the token's, in whatever order.
    int64_t filled() const { return at ? std::min(*at + 1, rows) : rows; }
};

struct Scratch {
    std::vector<const uint8_t*> keys;
    Aligned<float> q, scores;
};

thread_local Scratch scratch;

// Where the keys lie that token i sees: its window, then its entries.
template <class T>
void find_keys(const Problem& p, int64_t i, std::vector<const uint8_t*>& keys) {
    keys.clear();
    int64_t width = p.d * T::BYTES, end = p.filled() - p.t + i + 1;
    for (int64_t row = std::max<int64_t>(0, end - p.window); row < end; ++row) keys.push_back(p.recent + row * width);
    if (!p.entries) return;
    int64_t visible = std::min(p.visible[i], p.n);
    if (!p.chosen) {
        for (int64_t row = 0; row < visible; ++row) keys.push_back(p.entries + row * width);
        return;
    }
    for (int64_t slot = 0; slot < p.k; ++slot) {
        int64_t row = p.chosen[i * p.k + slot];
        if (row >= 0 && row < visible) keys.push_back(p.entries + row * width);
    }
}

// scores[h][key] = q[h] . key for COUNT keys at once.
template <class T, int COUNT>
DSV4_INLINE void score(const float* q, int64_t d, const uint8_t* const* keys, float* scores, int64_t stride) {
    f32x8 sums[HEADS][COUNT] = {};
    int64_t c = 0;
    for (; c + 8 <= d; c += 8) {
        f32x8 key[COUNT];
        for (int j = 0; j < COUNT; ++j) key[j] = T::eight(keys[j] + c * T::BYTES);
        for (int h = 0; h < HEADS; ++h) {
            f32x8 part = kept(load<f32x8>(q + h * d + c));
            for (int j = 0; j < COUNT; ++j) sums[h][j] = fma(part, key[j], sums[h][j]);
        }
    }
    for (int j = 0; j < COUNT; ++j) {
        f32x4 totals = dsv4::sums({sums[0][j], sums[1][j], sums[2][j], sums[3][j]});
        for (int h = 0; h < HEADS; ++h) {
            float total = totals[h];
            for (int64_t rest = c; rest < d; ++rest) total += q[h * d + rest] * T::one(keys[j] + rest * T::BYTES);
            scores[h * stride + j] = total;
        }
    }
}

// Scores become e^(score - most), and their sum, with the sink's, is returned. `stride` numbers may be written.
DSV4_INLINE float exponents(float* scores, int64_t count, int64_t stride, float sink) {
    float most = sink;
    for (int64_t i = 0; i < count; ++i) most = scores[i] > most ? scores[i] : most;
    std::fill(scores + count, scores + stride, -INFINITY);
    f32x8 total = {};
    for (int64_t i = 0; i < stride; i += 8) {
        f32x8 power = exp(load<f32x8>(scores + i) - splat(most));
        store(scores + i, power);
        total += power;
    }
    return sum(total) + exp(splat(sink - most))[0];
}

// Adds to out[h] the sum of shares[h][key] * key over `count` keys, for 8 * VECTORS columns from c on.
template <class T, int VECTORS>
DSV4_INLINE void gather(const uint8_t* const* keys, int64_t count, const float* shares, int64_t stride, int64_t c, int64_t d,
                        int heads, float* out) {
    f32x8 sums[HEADS][VECTORS] = {};
    for (int64_t i = 0; i < count; ++i) {
        f32x8 key[VECTORS];
        for (int v = 0; v < VECTORS; ++v) key[v] = T::eight(keys[i] + (c + 8 * v) * T::BYTES);
        for (int h = 0; h < HEADS; ++h) {
            f32x8 share = splat(shares[h * stride + i]);
            for (int v = 0; v < VECTORS; ++v) sums[h][v] = fma(share, key[v], sums[h][v]);
        }
    }
    for (int h = 0; h < heads; ++h)
        for (int v = 0; v < VECTORS; ++v) {
            float* to = out + h * d + c + 8 * v;
            store(to, load<f32x8>(to) + sums[h][v]);
        }
}

// The same for all columns. So few keys at a time that they stay in the cache while the columns are gone through.
template <class T>
void gather_some(const uint8_t* const* keys, int64_t count, const float* shares, int64_t stride, int64_t d, int heads,
                 float* out) {
    int64_t c = 0;
    for (; c + 8 * WIDE <= d; c += 8 * WIDE) gather<T, WIDE>(keys, count, shares, stride, c, d, heads, out);
    for (; c + 8 <= d; c += 8) gather<T, 1>(keys, count, shares, stride, c, d, heads, out);
    for (; c < d; ++c)
        for (int h = 0; h < heads; ++h)
            for (int64_t key = 0; key < count; ++key) out[h * d + c] += shares[h * stride + key] * T::one(keys[key] + c * T::BYTES);
}

// Heads first .. first + heads (at most HEADS) of token i, whose keys have been found.
template <class T>
void attend(const Problem& p, int64_t i, int64_t first, int heads) {
    const auto& keys = scratch.keys;
    int64_t count = int64_t(keys.size()), stride = (count + 7) / 8 * 8, d = p.d;
    scratch.q.assign(size_t(HEADS * d), 0.0f);  // heads that are not there have zeros
    scratch.scores.resize(std::max(scratch.scores.size(), size_t(HEADS * stride)));
    float *q = scratch.q.data(), *scores = scratch.scores.data();
    float scale = 1.0f / std::sqrt(float(d));
    const float* from = p.q + (i * p.heads + first) * d;
    for (int64_t c = 0; c < heads * d; ++c) q[c] = from[c] * scale;

    int64_t j = 0;
    for (; j + WIDE <= count; j += WIDE) score<T, WIDE>(q, d, keys.data() + j, scores + j, stride);
    for (; j < count; ++j) score<T, 1>(q, d, keys.data() + j, scores + j, stride);
    float inverse[HEADS];
    for (int h = 0; h < HEADS; ++h)
        inverse[h] = 1.0f / exponents(scores + h * stride, count, stride, h < heads ? p.sink[first + h] : 0.0f);

    float* out = p.out + (i * p.heads + first) * d;
    std::fill(out, out + heads * d, 0.0f);
    for (int64_t key = 0; key < count; key += KEYS)
        gather_some<T>(keys.data() + key, std::min(KEYS, count - key), scores + key, stride, d, heads, out);
    for (int h = 0; h < heads; ++h)
        for (int64_t c = 0; c < d; ++c) out[h * d + c] *= inverse[h];
    for (int h = 0; p.turns && h < heads; ++h)
        turn_pairs(out + (h + 1) * d - 2 * p.pairs, p.turns + i * 2 * p.pairs, p.pairs, -1.0f);
}

template <class T>
void attend_all(const Problem& p) {
    int64_t blocks = (p.heads + HEADS - 1) / HEADS;
    // A prompt has tokens enough for all threads, and a token's keys are then found once for all its heads.
    int64_t grain = p.t >= 4 * threads() ? blocks : 1;
    parallel(p.t * blocks, grain, [&](int64_t begin, int64_t end) {
        int64_t found = -1;
        for (int64_t item = begin; item < end; ++item) {
            int64_t i = item / blocks, first = item % blocks * HEADS;
            if (i != found) find_keys<T>(p, found = i, scratch.keys);
            attend<T>(p, i, first, int(std::min<int64_t>(HEADS, p.heads - first)));
        }
    });
}

}  // namespace

// q [t, heads, d], recent [rows, d], entries [n, d] or null, visible [t], chosen [t, k] or null, sink [heads] -> out like q.
// Keys are bfloat16 or float32. With turns [t, pairs] the result is turned back by them. With `at`, where the only token's position
// lies when its turn comes, recent is a ring of which so many rows are filled.
DSV4_API void dsv4_sparse_attention(const float* q, int64_t t, int64_t heads, int64_t d, const uint8_t* recent, int64_t rows,
                                    const uint8_t* entries, int64_t n, const int64_t* visible, const int64_t* chosen,
                                    int64_t k, const float* sink, int64_t window, int64_t bf16, const float* turns,
                                    int64_t pairs, const int64_t* at, float* out) {
    Problem p{q, t, heads, d, recent, rows, entries, n, visible, chosen, k, sink, window, turns, pairs, at, out};
    submit([=] { bf16 ? attend_all<BF16Format>(p) : attend_all<F32Format>(p); });
}
