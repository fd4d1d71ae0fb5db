// Index scores and the best of them. The queries' heads lie side by side in vectors, so that a key's products with all heads
// need no sums across a vector until the very end.
#include <algorithm>
#include <functional>
#include <vector>

#include "api.h"
#include "floats.h"
#include "pool.h"
#include "queue.h"

using namespace dsv4;

namespace {

constexpr int64_t PIECE = 64;  // keys that a thread takes at a time when there is one token
constexpr int WIDE = 4;        // vectors of heads that are held at once

// One token's queries, turned over: q [d][heads padded to eights], weights with zeros for the padding.
struct Query {
    std::vector<float> q, weights;
    int64_t d, vectors;

    void turn(const float* from, const float* with, int64_t heads, int64_t width) {
        d = width;
        vectors = (heads + 7) / 8;
        q.assign(size_t(d * vectors * 8), 0.0f);
        weights.assign(size_t(vectors * 8), 0.0f);
        std::copy_n(with, heads, weights.begin());
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t c = 0; c < d; ++c) q[size_t(c * vectors * 8 + h)] = from[h * d + c];
    }
};

// sum over VECTORS * 8 heads of weight * relu(q . key) for two keys.
template <int VECTORS>
DSV4_INLINE void score_heads(const Query& query, int64_t first, const float* a, const float* b, f32x8& for_a, f32x8& for_b) {
    f32x8 sums_a[VECTORS] = {}, sums_b[VECTORS] = {};
    const float* q = query.q.data() + 8 * first;
    for (int64_t c = 0; c < query.d; ++c, q += 8 * query.vectors) {
        f32x8 from_a = splat(a[c]), from_b = splat(b[c]);
        for (int v = 0; v < VECTORS; ++v) {
            f32x8 part = load<f32x8>(q + 8 * v);
            sums_a[v] = fma(part, from_a, sums_a[v]);
            sums_b[v] = fma(part, from_b, sums_b[v]);
        }
    }
    for (int v = 0; v < VECTORS; ++v) {
        f32x8 weight = load<f32x8>(query.weights.data() + 8 * (first + v)), zero = {};
        // Written so that NaN passes.
        for_a = fma(weight, sums_a[v] < zero ? zero : sums_a[v], for_a);
        for_b = fma(weight, sums_b[v] < zero ? zero : sums_b[v], for_b);
    }
}

template <class T>
const float* widened(const uint8_t* key, int64_t d, std::vector<float>& to) {
    to.resize(size_t(d));
    int64_t c = 0;
    for (; c + 8 <= d; c += 8) store(to.data() + c, T::eight(key + c * T::BYTES));
    for (; c < d; ++c) to[size_t(c)] = T::one(key + c * T::BYTES);
    return to.data();
}

// Scores of keys begin .. end.
template <class T>
void score(const Query& query, const uint8_t* keys, int64_t begin, int64_t end, float* scores) {
    thread_local std::vector<float> first, second;
    for (int64_t n = begin; n < end; n += 2) {
        int64_t width = query.d * T::BYTES, other = std::min(n + 1, end - 1);
        const float* a = widened<T>(keys + n * width, query.d, first);
        const float* b = widened<T>(keys + other * width, query.d, second);
        f32x8 for_a = {}, for_b = {};
        int64_t v = 0;
        for (; v + WIDE <= query.vectors; v += WIDE) score_heads<WIDE>(query, v, a, b, for_a, for_b);
        for (; v < query.vectors; ++v) score_heads<1>(query, v, a, b, for_a, for_b);
        scores[n] = sum(for_a);
        scores[other] = other == n ? scores[n] : sum(for_b);
    }
}

// The numbers of the k greatest of n scores, ties to the first; -1 in the places that are left over.
void choose(const float* scores, int64_t n, int64_t k, int64_t slots, int64_t* chosen) {
    thread_local std::vector<float> order;
    order.resize(std::max(order.size(), size_t(n)));
    // NaN counts as greatest, as it does in torch: a comparison that is neither true nor false would break the search.
    auto key = [](float x) { return x == x ? x : INFINITY; };
    for (int64_t i = 0; i < n; ++i) order[size_t(i)] = key(scores[i]);
    std::nth_element(order.begin(), order.begin() + (k - 1), order.begin() + n, std::greater<float>());
    float least = order[size_t(k - 1)];
    int64_t above = 0, ties, found = 0;
    for (int64_t i = 0; i < n; ++i) above += key(scores[i]) > least;
    ties = k - above;
    for (int64_t i = 0; i < n; ++i) {
        float x = key(scores[i]);
        if (x > least || (x == least && ties-- > 0)) chosen[found++] = i;
    }
    std::fill(chosen + found, chosen + slots, int64_t(-1));
}

template <class T>
void top_indices(const float* q, const float* weights, int64_t t, int64_t heads, int64_t d, const uint8_t* keys,
                 const int64_t* visible, int64_t n, int64_t slots, int64_t* chosen) {
    auto sees = [&](int64_t i) { return std::min(visible[i], n); };
    auto all = [&](int64_t i) {  // who sees no more than may be chosen needs no scores
        for (int64_t slot = 0; slot < slots; ++slot) chosen[i * slots + slot] = slot < sees(i) ? slot : -1;
    };
    if (t == 1) {
        if (sees(0) <= slots) return all(0);
        thread_local Query query;
        thread_local std::vector<float> scores;
        query.turn(q, weights, heads, d);
        scores.resize(std::max(scores.size(), size_t(n)));
        const Query& shared = query;
        float* to = scores.data();
        parallel(sees(0), PIECE, [&](int64_t begin, int64_t end) { score<T>(shared, keys, begin, end, to); });
        return choose(to, sees(0), slots, slots, chosen);
    }
    parallel(t, 1, [&](int64_t begin, int64_t end) {
        thread_local Query query;
        thread_local std::vector<float> scores;
        scores.resize(std::max(scores.size(), size_t(n)));
        for (int64_t i = begin; i < end; ++i) {
            if (sees(i) <= slots) {
                all(i);
                continue;
            }
            query.turn(q + i * heads * d, weights + i * heads, heads, d);
            score<T>(query, keys, 0, sees(i), scores.data());
            choose(scores.data(), sees(i), slots, slots, chosen + i * slots);
        }
    });
}

}  // namespace

// q [t, heads, d], weights [t, heads], keys [n, d] (bfloat16 or float32), visible [t] -> chosen [t, slots].
DSV4_API void dsv4_top_indices(const float* q, const float* weights, int64_t t, int64_t heads, int64_t d, const uint8_t* keys,
                               const int64_t* visible, int64_t n, int64_t slots, int64_t bf16, int64_t* chosen) {
    auto find = bf16 ? top_indices<BF16Format> : top_indices<F32Format>;
    submit([=] { find(q, weights, t, heads, d, keys, visible, n, slots, chosen); });
}
