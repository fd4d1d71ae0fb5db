// Hyper-connections: products with fn make a token's mixture, sigmoids and Sinkhorn's rounds make it shares, and what is
// left are sums of a few streams.
#include <cmath>
#include <vector>

#include "api.h"
#include "products.h"
#include "queue.h"
#include "steps.h"

using namespace dsv4;

namespace {

constexpr int64_t GRAIN = int64_t(1) << 15;  // values that one thread adds up sooner than two

void sigmoid(float* x, int64_t n) {
    f32x8 one = splat(1.0f);
    by_eights(n, [&](int64_t i, auto part) { store(x + i, one / (one + exp(-load(x + i, part))), part); });
}

// The softmax of each row of x [s, s], plus eps.
void softmax_rows(float* x, int64_t s, float eps) {
    for (int64_t i = 0; i < s; ++i) {
        float* row = x + i * s;
        float most = row[0];
        for (int64_t j = 1; j < s; ++j) most = std::max(most, row[j]);
        for (int64_t j = 0; j < s; ++j) row[j] -= most;
    }
    by_eights(s * s, [&](int64_t i, auto part) { store(x + i, exp(load(x + i, part)), part); });
    for (int64_t i = 0; i < s; ++i) {
        float* row = x + i * s;
        float total = 0;
        for (int64_t j = 0; j < s; ++j) total += row[j];
        for (int64_t j = 0; j < s; ++j) row[j] = row[j] / total + eps;
    }
}

// Divides columns and rows of start [s, s] by their sums (plus eps) in turn, columns first and last. Only the products of the
// divisors are kept, see sinkhorn in ref.py. `scratch` has room for 2 * s values.
void balance(float* start, int64_t s, float eps, int64_t rounds, float* scratch) {
    float *rows = scratch, *columns = scratch + s;
    for (int64_t i = 0; i < s; ++i) rows[i] = columns[i] = 1.0f;
    for (int64_t round = 0; round < rounds || round == 0; ++round) {
        for (int64_t i = 0; i < s && round > 0; ++i) {
            float total = eps * rows[i];
            for (int64_t j = 0; j < s; ++j) total += start[i * s + j] / columns[j];
            rows[i] = total;
        }
        for (int64_t j = 0; j < s; ++j) {
            float total = eps * columns[j];
            for (int64_t i = 0; i < s; ++i) total += start[i * s + j] / rows[i];
            columns[j] = total;
        }
    }
    for (int64_t i = 0; i < s; ++i)
        for (int64_t j = 0; j < s; ++j) start[i * s + j] = start[i * s + j] / rows[i] / columns[j];
}

// The same for four streams, in registers.
void balance_four(float* start, float eps, int64_t rounds) {
    f32x4 r[4], c[4];  // rows and columns of start
    for (int i = 0; i < 4; ++i) {
        r[i] = load<f32x4>(start + 4 * i);
        c[i] = f32x4{start[i], start[4 + i], start[8 + i], start[12 + i]};
    }
    const f32x4 one = {1, 1, 1, 1};
    f32x4 rows = one, columns = (eps + r[0] + r[1]) + (r[2] + r[3]);
    for (int64_t round = 1; round < rounds; ++round) {
        f32x4 u = one / columns;
        rows = (eps * rows + c[0] * u[0] + c[1] * u[1]) + (c[2] * u[2] + c[3] * u[3]);
        f32x4 v = one / rows;
        columns = (eps * columns + r[0] * v[0] + r[1] * v[1]) + (r[2] * v[2] + r[3] * v[3]);
    }
    for (int i = 0; i < 4; ++i) store(start + 4 * i, r[i] / rows[i] / columns);
}

// x [d] = sum_j shares[j] * streams[j], streams [s, d].
void weigh(const float* shares, const float* streams, int64_t s, int64_t d, float* x) {
    by_eights(d, [&](int64_t i, auto part) {
        f32x8 total = splat(shares[0]) * load(streams + i, part);
        for (int64_t j = 1; j < s; ++j) total = fma(splat(shares[j]), load(streams + j * d + i, part), total);
        store(x + i, total, part);
    });
}

// New streams [s, d]: stream k = post[k] * out + sum_j across[j, k] * streams[j]. S is s, or 0 where s is not known beforehand.
template <int S>
void spread(const float* out, const float* streams, const float* post, const float* across, int64_t s, int64_t d, float* to) {
    if (S) s = S;
    by_eights(d, [&](int64_t i, auto part) {
        f32x8 added = load(out + i, part);
        for (int64_t k = 0; k < s; ++k) {
            f32x8 total = splat(post[k]) * added;
            for (int64_t j = 0; j < s; ++j) total = fma(splat(across[j * s + k]), load(streams + j * d + i, part), total);
            store(to + k * d + i, total, part);
        }
    });
}

// What a token's products with fn are multiplied with, because its streams were not normed before.
float norm_factor(const float* streams, int64_t n, float eps) {
    return 1.0f / std::sqrt(sum_of_squares(streams, n) / float(n) + eps);
}

// Products of t tokens with fn [m, s * d]; they last until the calling thread's next call.
const float* mixtures(const float* streams, int64_t t, int64_t cols, const float* fn, int64_t m) {
    thread_local std::vector<float> found;
    found.resize(size_t(t * m));
    Weight weight = {reinterpret_cast<const uint8_t*>(fn), nullptr, m, cols, cols * int64_t(sizeof(float)), 0, F32, 0, 0};
    products(streams, t, weight, found.data());
    return found.data();
}

struct Constants {
    const float *base, *scale, *norm;  // norm [d] or null
    float norm_eps, eps;
    int64_t rounds;
};

// One token: its products with fn become shares, the shares x [d], post [s] and across [s, s]. `scratch` holds 2 * s values.
void mix_token(const float* products, const float* streams, int64_t s, int64_t d, const Constants& c, float* scratch, float* x,
               float* post, float* across) {
    float factor = norm_factor(streams, s * d, c.norm_eps), *pre = scratch;
    auto logit = [&](int part, int64_t i) { return c.base[i] + c.scale[part] * (products[i] * factor); };
    for (int64_t i = 0; i < s; ++i) pre[i] = logit(0, i);
    for (int64_t i = 0; i < s; ++i) post[i] = logit(1, s + i);
    for (int64_t i = 0; i < s * s; ++i) across[i] = logit(2, 2 * s + i);

    sigmoid(pre, s);
    for (int64_t i = 0; i < s; ++i) pre[i] += c.eps;
    weigh(pre, streams, s, d, x);
    if (c.norm) norm_row(x, c.norm, d, c.norm_eps, x);

    sigmoid(post, s);
    for (int64_t i = 0; i < s; ++i) post[i] *= 2;

    softmax_rows(across, s, c.eps);
    if (s == 4)
        balance_four(across, c.eps, c.rounds);
    else
        balance(across, s, c.eps, c.rounds, scratch);
}

void mix_streams(const float* streams, int64_t t, int64_t s, int64_t d, const float* fn, const float* base,
                 const float* scale, float norm_eps, float eps, int64_t rounds, const float* norm, float* x, float* post,
                 float* across) {
    int64_t m = (2 + s) * s;
    const float* mixes = mixtures(streams, t, s * d, fn, m);
    Constants constants = {base, scale, norm, norm_eps, eps, rounds};
    parallel(t, items_for(GRAIN, s * d), [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(size_t(2 * s));
        for (int64_t i = begin; i < end; ++i)
            mix_token(mixes + i * m, streams + i * s * d, s, d, constants, scratch.data(), x + i * d, post + i * s,
                      across + i * s * s);
    });
}

void spread_streams(const float* out, const float* streams, const float* post, const float* across, int64_t t,
                    int64_t s, int64_t d, float* to) {
    auto one = s == 4 ? spread<4> : spread<0>;
    parallel(t, items_for(GRAIN, s * d), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            one(out + i * d, streams + i * s * d, post + i * s, across + i * s * s, s, d, to + i * s * d);
    });
}

void merge_streams(const float* streams, int64_t t, int64_t s, int64_t d, const float* fn, const float* base,
                   const float* scale, float norm_eps, float eps, float* x) {
    const float* mixes = mixtures(streams, t, s * d, fn, s);
    parallel(t, items_for(GRAIN, s * d), [&](int64_t begin, int64_t end) {
        std::vector<float> shares(static_cast<size_t>(s));
        for (int64_t token = begin; token < end; ++token) {
            const float* here = streams + token * s * d;
            float factor = norm_factor(here, s * d, norm_eps), *share = shares.data();
            for (int64_t i = 0; i < s; ++i) share[i] = mixes[token * s + i] * factor * scale[0] + base[i];
            sigmoid(share, s);
            for (int64_t i = 0; i < s; ++i) share[i] += eps;
            weigh(share, here, s, d, x + token * d);
        }
    });
}

}  // namespace

// streams [t, s, d], fn [(2 + s) * s, s * d], base [(2 + s) * s], scale [3] -> x [t, d], normed where norm [d] is not null,
// post [t, s], across [t, s, s].
DSV4_API void dsv4_mix_streams(const float* streams, int64_t t, int64_t s, int64_t d, const float* fn, const float* base,
                               const float* scale, float norm_eps, float eps, int64_t rounds, const float* norm,
                               float* x, float* post, float* across) {
    submit([=] { mix_streams(streams, t, s, d, fn, base, scale, norm_eps, eps, rounds, norm, x, post, across); });
}

// out [t, d], streams [t, s, d], post [t, s], across [t, s, s] -> to [t, s, d].
DSV4_API void dsv4_spread_streams(const float* out, const float* streams, const float* post, const float* across, int64_t t,
                                  int64_t s, int64_t d, float* to) {
    submit([=] { spread_streams(out, streams, post, across, t, s, d, to); });
}

// streams [t, s, d], fn [s, s * d], base [s], scale [1] -> x [t, d].
DSV4_API void dsv4_merge_streams(const float* streams, int64_t t, int64_t s, int64_t d, const float* fn, const float* base,
                                 const float* scale, float norm_eps, float eps, float* x) {
    submit([=] { merge_streams(streams, t, s, d, fn, base, scale, norm_eps, eps, x); });
}
