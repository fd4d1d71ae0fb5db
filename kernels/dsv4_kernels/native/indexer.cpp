// Index scores and the best of them. The queries' heads lie side by side in vectors, so that a key's products with all heads
// need no sums across a vector until the very end.
#include <algorithm>
#include <functional>
#include <type_traits>
#include <vector>

#include "aligned.h"
#include "api.h"
#include "floats.h"
#include "pool.h"
#include "queue.h"

using namespace dsv4;

namespace {

constexpr int64_t PIECE = 64;  // keys that a thread takes at a time when there is one token
constexpr int WIDE = 4;        // vectors of heads that are held at once
constexpr int KEYS = REGISTERS >= 32 ? 4 : 2;

DSV4_INLINE f32x8 times(f32x8 part, float number, f32x8 onto) { return fma(part, splat(number), onto); }
#if DSV4_BF16
DSV4_INLINE f32x8 times(u32x8 part, uint32_t pair, f32x8 onto) { return dot_pairs(part, u32x8{} + pair, onto); }
#endif

// One token's queries, turned over: of each column a number of every head, heads padded to eights. V is f32x8 or, where the
// processor multiplies two bf16 numbers at once and queries are such numbers (as those rounded to FP4 are), u32x8 of pairs of
// columns.
template <class V>
struct Turned {
    Aligned<V> q;  // [columns][vectors]
    Aligned<f32x8> weights;  // zero for the padding
    int64_t columns, vectors;

    void turn(const float* from, const float* with, int64_t heads, int64_t d) {
        constexpr int64_t WIDTH = std::is_same_v<V, f32x8> ? 1 : 2;
        columns = d / WIDTH;
        vectors = (heads + 7) / 8;
        q.assign(size_t(columns * vectors), V{});
        weights.assign(size_t(vectors), f32x8{});
        std::memcpy(weights.data(), with, size_t(heads) * sizeof(float));
        auto* to = reinterpret_cast<std::remove_reference_t<decltype(q[0][0])>*>(q.data());
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t c = 0; c < columns; ++c) to[c * vectors * 8 + h] = number(from + h * d + c * WIDTH, V{});
    }

private:
    static float number(const float* from, f32x8) { return *from; }
    static uint32_t number(const float* from, u32x8) { return bits<uint32_t>(from[0]) >> 16 | bits<uint32_t>(from[1]); }
};

// sum over VECTORS * 8 heads of weight * relu(q . key) for some keys; `numbers` of theirs, one for each column.
template <int VECTORS, class V, class N>
DSV4_INLINE void score_heads(const Turned<V>& query, int64_t first, const N* const (&numbers)[KEYS], f32x8 (&scores)[KEYS]) {
    f32x8 sums[KEYS][VECTORS] = {};
    const V* q = query.q.data() + first;
    for (int64_t c = 0; c < query.columns; ++c, q += query.vectors)
        for (int v = 0; v < VECTORS; ++v) {
            V part = kept(q[v]);
            for (int j = 0; j < KEYS; ++j) sums[j][v] = times(part, load<N>(numbers[j] + c), sums[j][v]);
        }
    for (int v = 0; v < VECTORS; ++v)
        for (int j = 0; j < KEYS; ++j) {
            f32x8 zero = {}, product = sums[j][v];
            scores[j] = fma(query.weights[size_t(first + v)], product < zero ? zero : product, scores[j]);  // NaN passes
        }
}

template <class V, class N>
DSV4_INLINE void score_keys(const Turned<V>& query, const N* const (&numbers)[KEYS], float (&scores)[KEYS]) {
    f32x8 found[KEYS] = {};
    int64_t v = 0;
    for (; v + WIDE <= query.vectors; v += WIDE) score_heads<WIDE>(query, v, numbers, found);
    for (; v < query.vectors; ++v) score_heads<1>(query, v, numbers, found);
    for (int j = 0; j < KEYS; ++j) scores[j] = sum(found[j]);
}

template <class T>
const float* widened(const uint8_t* key, int64_t d, Aligned<float>& to) {
    to.resize(size_t(d));
    int64_t c = 0;
    for (; c + 8 <= d; c += 8) store(to.data() + c, T::eight(key + c * T::BYTES));
    for (; c < d; ++c) to[size_t(c)] = T::one(key + c * T::BYTES);
    return to.data();
}

// One token's queries and the scores of keys with them.
template <class T>
class Query {
public:
    void turn(const float* q, const float* weights, int64_t heads, int64_t width) {
        d = width;
        pairs = pairable(q, heads * d);
#if DSV4_BF16
        if (pairs) return of_pairs.turn(q, weights, heads, d);
#endif
        of_floats.turn(q, weights, heads, d);
    }

    void score(const uint8_t* keys, int64_t begin, int64_t end, float* scores) const {
        thread_local Aligned<float> wide[KEYS];
        for (int64_t n = begin; n < end; n += KEYS) {
            const uint8_t* key[KEYS];
            float found[KEYS];
            for (int j = 0; j < KEYS; ++j) key[j] = keys + std::min(n + j, end - 1) * d * T::BYTES;
            if (pairs) {
#if DSV4_BF16
                const uint32_t* numbers[KEYS];
                for (int j = 0; j < KEYS; ++j) numbers[j] = reinterpret_cast<const uint32_t*>(key[j]);
                score_keys(of_pairs, numbers, found);
#endif
            } else {
                const float* numbers[KEYS];
                for (int j = 0; j < KEYS; ++j) numbers[j] = widened<T>(key[j], d, wide[j]);
                score_keys(of_floats, numbers, found);
            }
            std::copy_n(found, std::min<int64_t>(KEYS, end - n), scores + n);
        }
    }

private:
    // Whether nothing is lost in bf16.
    bool pairable(const float* q, int64_t count) const {
#if DSV4_BF16
        if (!std::is_same_v<T, BF16Format> || d % 2) return false;
        uint32_t lost = 0;
        for (int64_t i = 0; i < count; ++i) lost |= bits<uint32_t>(q[i]) & 0xffff;
        return lost == 0;
#else
        (void)q, (void)count;
        return false;
#endif
    }

    int64_t d = 0;
    bool pairs = false;
    Turned<f32x8> of_floats;
#if DSV4_BF16
    Turned<u32x8> of_pairs;
#endif
};

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
        thread_local Query<T> query;
        thread_local std::vector<float> scores;
        query.turn(q, weights, heads, d);
        scores.resize(std::max(scores.size(), size_t(n)));
        const Query<T>& shared = query;
        float* to = scores.data();
        parallel(sees(0), PIECE, [&](int64_t begin, int64_t end) { shared.score(keys, begin, end, to); });
        return choose(to, sees(0), slots, slots, chosen);
    }
    parallel(t, 1, [&](int64_t begin, int64_t end) {
        thread_local Query<T> query;
        thread_local std::vector<float> scores;
        scores.resize(std::max(scores.size(), size_t(n)));
        for (int64_t i = begin; i < end; ++i) {
            if (sees(i) <= slots) {
                all(i);
                continue;
            }
            query.turn(q + i * heads * d, weights + i * heads, heads, d);
            query.score(keys, 0, sees(i), scores.data());
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
