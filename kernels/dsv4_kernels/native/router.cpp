// Routers: products with the gate, scores, the best of them, and weights that sum to the scale.
#include <algorithm>
#include <cmath>
#include <vector>

#include "api.h"
#include "products.h"
#include "queue.h"
#include "rows.h"

using namespace dsv4;

namespace {

// ln(1 + u) for u in [0, 1], as a series in z = u / (2 + u): twice the area tangent of z.
DSV4_INLINE f32x8 log1p(f32x8 u) {
    f32x8 z = u / (splat(2.0f) + u), w = z * z, series = splat(2.0f / 15);
    for (int odd = 13; odd > 0; odd -= 2) series = fma(series, w, splat(2.0f / float(odd)));
    return series * z;
}

// sqrt(ln(1 + e^x)), written so that e^x stays below 1.
void score(float* x, int64_t n) {
    by_eights(n, [&](int64_t i, auto part) {
        f32x8 v = load(x + i, part), zero = {};
        f32x8 positive = v > zero ? v : zero;
        store(x + i, positive + log1p(exp(v - 2 * positive)), part);
    });
    for (int64_t i = 0; i < n; ++i) x[i] = std::sqrt(x[i]);
}

// The k places with the greatest score + bias, greatest first, equal ones in order. `keys` has room for k values.
void choose(const float* scores, const float* bias, int64_t n, int64_t k, float* keys, int64_t* chosen) {
    for (int64_t i = 0; i < n; ++i) {
        float key = scores[i] + bias[i];
        if (i >= k && !(key > keys[k - 1])) continue;
        int64_t place = std::min(i, k - 1);
        for (; place > 0 && key > keys[place - 1]; --place) {
            keys[place] = keys[place - 1];
            chosen[place] = chosen[place - 1];
        }
        keys[place] = key;
        chosen[place] = i;
    }
}

void share_out(float* weights, int64_t k, float scale) {
    float total = 0;
    for (int64_t i = 0; i < k; ++i) total += weights[i];
    for (int64_t i = 0; i < k; ++i) weights[i] = weights[i] / total * scale;
}

void route_learned(const float* x, int64_t t, const Weight& gate, const float* bias, int64_t k, float scale, float* weights,
                   int64_t* experts) {
    thread_local std::vector<float> logits;
    int64_t n = gate.rows;
    logits.resize(size_t(t * n));
    float* all = logits.data();
    products(x, t, gate, all);
    parallel(t, items_for(SHORT, 16 * n), [&](int64_t begin, int64_t end) {
        std::vector<float> keys(static_cast<size_t>(k));
        for (int64_t token = begin; token < end; ++token) {
            float *scores = all + token * n, *mine = weights + token * k;
            int64_t* chosen = experts + token * k;
            score(scores, n);
            choose(scores, bias, n, k, keys.data(), chosen);
            for (int64_t i = 0; i < k; ++i) mine[i] = scores[chosen[i]];
            share_out(mine, k, scale);
        }
    });
}

// A table [vocab, k] and who looks up what in it.
struct Lookup {
    const int64_t *table, *ids;
    int64_t vocab, k;

    bool wrong(int64_t token, int64_t n) const {
        auto outside = [](int64_t i, int64_t size) { return i < 0 || i >= size; };
        if (outside(ids[token], vocab)) return true;
        const int64_t* found = row(token);
        return std::any_of(found, found + k, [&](int64_t expert) { return outside(expert, n); });
    }
    const int64_t* row(int64_t token) const { return table + ids[token] * k; }
};

void route_by_hash(const float* x, int64_t t, const Weight& gate, const Lookup& lookup, float scale, float* weights,
                   int64_t* experts, int64_t* wrong) {
    int64_t k = lookup.k;
    *wrong = 0;
    for (int64_t token = 0; token < t; ++token) *wrong |= lookup.wrong(token, gate.rows);
    if (*wrong) {  // whoever queued more work finds numbers that it can work with, and an answer that nobody takes for one
        std::fill_n(experts, t * k, 0);
        std::fill_n(weights, t * k, NAN);
    }
    if (*wrong || t == 0) return;
    Activations a = rounded(x, t, gate.cols, wants(gate), 0);
    parallel(t, items_for(SHORT, k * gate.cols), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            float* mine = weights + token * k;
            int64_t* chosen = experts + token * k;
            std::copy_n(lookup.row(token), k, chosen);
            for (int64_t i = 0; i < k; ++i) multiply(gate, chosen[i], chosen[i] + 1, a, Picked{1, token}, mine + i, 1);
            score(mine, k);
            share_out(mine, k, scale);
        }
    });
}

}  // namespace

// x [t, d], gate [n, d], bias [n] -> weights [t, k], experts [t, k].
DSV4_API void dsv4_route_learned(const float* x, int64_t t, const Weight* gate, const float* bias, int64_t k, float scale,
                                 float* weights, int64_t* experts) {
    Weight w = *gate;
    submit([=] { route_learned(x, t, w, bias, k, scale, weights, experts); });
}

// x [t, d], gate [n, d], table [vocab, k], ids [t] -> weights [t, k], experts [t, k]. Only the experts of the table are scored.
// `wrong` becomes 1 when an id is not in the table or an expert is not in the gate.
DSV4_API void dsv4_route_by_hash(const float* x, int64_t t, const Weight* gate, const int64_t* table, int64_t vocab, int64_t k,
                                 const int64_t* ids, float scale, float* weights, int64_t* experts, int64_t* wrong) {
    Weight w = *gate;
    Lookup lookup{table, ids, vocab, k};
    submit([=] { route_by_hash(x, t, w, lookup, scale, weights, experts, wrong); });
}
