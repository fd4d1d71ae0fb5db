// Routed experts of one layer in one call. Tokens are grouped by expert, so that an expert's rows are read once however many
// tokens chose it; both halves are cut into pieces of rows over all experts, so that no thread waits at one of them.
#include <algorithm>
#include <vector>

#include "api.h"
#include "pages.h"
#include "pool.h"
#include "queue.h"
#include "simd.h"
#include "weight.h"

using namespace dsv4;

namespace {

struct Expert {
    Weight gate, up, down;  // w1, w3 [width, d]; w2 [d, width]
};

// Who visits whom: visits are numbered by expert, within an expert by token.
struct Visits {
    std::vector<int32_t> tokens;  // of each visit
    std::vector<float> shares;
    std::vector<int64_t> experts, starts;  // experts that have visits; where each one's begin, and the end

    void sort(const int64_t* chosen, const float* weights, int64_t t, int64_t k, int64_t n) {
        std::vector<int64_t> places(n + 1);
        for (int64_t i = 0; i < t * k; ++i) ++places[chosen[i] + 1];
        experts.clear();
        starts.clear();
        for (int64_t e = 0; e < n; ++e) {
            if (places[e + 1]) {
                experts.push_back(e);
                starts.push_back(places[e]);
            }
            places[e + 1] += places[e];
        }
        starts.push_back(t * k);
        tokens.resize(t * k);
        shares.resize(t * k);
        for (int64_t i = 0; i < t * k; ++i) {
            int64_t place = places[chosen[i]]++;
            tokens[place] = int32_t(i / k);
            shares[place] = weights[i];
        }
    }

    Picked of(int64_t number) const {
        return {starts[number + 1] - starts[number], 0, 1, tokens.data() + starts[number]};
    }
};

DSV4_INLINE float silu_times(float gate, float up, float limit, float share) {
    // Comparisons are written so that NaN stays NaN.
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return gate / (1.0f + std::exp(-gate)) * up * share;
}

struct Scratch {
    Visits visits;
    std::vector<float> hidden;
};

thread_local Scratch scratch;

// Rows begin .. end of gate and up for all visits of one expert; hidden [visits, width].
void into_hidden(const Expert& expert, const Visits& visits, int64_t number, int64_t begin, int64_t end,
                 const Activations& x, const Activations& x_up, float limit, float* hidden) {
    thread_local std::vector<float> gates, ups;
    Picked picked = visits.of(number);
    int64_t rows = end - begin, width = expert.gate.rows;
    gates.resize(std::max(gates.size(), size_t(picked.count * rows)));
    ups.resize(gates.size());
    multiply(expert.gate, begin, end, x, picked, gates.data(), rows);
    multiply(expert.up, begin, end, x_up, picked, ups.data(), rows);
    for (int64_t i = 0; i < picked.count; ++i) {
        int64_t visit = visits.starts[number] + i;
        float* to = hidden + visit * width + begin;
        for (int64_t r = 0; r < rows; ++r)
            to[r] = silu_times(gates[i * rows + r], ups[i * rows + r], limit, visits.shares[visit]);
    }
}

// Rows begin .. end of down for all visits of one expert, added to their tokens' rows of out [t, d].
void add_down(const Expert& expert, const Visits& visits, int64_t number, int64_t begin, int64_t end,
              const Activations& hidden, float* out) {
    thread_local std::vector<float> found;
    Picked picked{visits.starts[number + 1] - visits.starts[number], visits.starts[number]};
    int64_t rows = end - begin, d = expert.down.rows;
    found.resize(std::max(found.size(), size_t(picked.count * rows)));
    multiply(expert.down, begin, end, hidden, picked, found.data(), rows);
    for (int64_t i = 0; i < picked.count; ++i) {
        float* to = out + visits.tokens[visits.starts[number] + i] * d + begin;
        for (int64_t r = 0; r < rows; ++r) to[r] += found[i * rows + r];
    }
}

// How many experts are asked for before they are computed: more than a token chooses, and of a prompt's so few that what
// was read is not driven out again before its turn.
constexpr int64_t AHEAD = 16;

// Gate and up of the visited experts first .. end, as far as there are so many.
void ask_for_gates(const Expert* experts, const Visits& visits, int64_t first, int64_t end) {
    end = std::min(end, int64_t(visits.experts.size()));
    for (int64_t number = first; number < end; ++number) {
        ask_for(experts[visits.experts[number]].gate);
        ask_for(experts[visits.experts[number]].up);
    }
}

// Down of all visited experts: whose rows are computed, every expert's.
void ask_for_downs(const Expert* experts, const Visits& visits) {
    for (int64_t number : visits.experts) ask_for(experts[number].down);
}

// What is added to `out` is the sum over each token's experts.
void add_experts(const float* x, int64_t t, const float* weights, const int64_t* chosen, int64_t k, const Expert* experts,
                 int64_t n, float limit, bool fresh, float* out) {
    const Weight &gate = experts->gate, &up = experts->up, &down = experts->down;
    Visits& visits = scratch.visits;
    visits.sort(chosen, weights, t, k, n);
    scratch.hidden.resize(std::max(scratch.hidden.size(), size_t(t * k * gate.rows)));
    float* hidden = scratch.hidden.data();
    int64_t count = int64_t(visits.experts.size());
    bool asks = n > 1 && asks_ahead();  // the shared expert was needed for the last token too
    if (asks) {
        ask_for_gates(experts, visits, 0, AHEAD);
        if (count <= AHEAD) ask_for_downs(experts, visits);
    }

    if (fresh) std::fill_n(out, t * down.rows, 0.0f);
    Activations a = rounded(x, t, gate.cols, wants(gate), 0);
    Activations a_up = same(wants(gate), wants(up)) ? a : rounded(x, t, up.cols, wants(up), 1);
    int64_t visitors = std::max<int64_t>(1, t * k / std::max<int64_t>(1, count));
    int64_t piece = std::min(rows_per_piece(gate.rows, gate.cols, visitors), int64_t(64));
    int64_t pieces = (gate.rows + piece - 1) / piece;
    parallel(count * pieces, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            int64_t number = i / pieces, first = i % pieces * piece;
            if (asks && first == 0) ask_for_gates(experts, visits, number + AHEAD, number + AHEAD + 1);
            into_hidden(experts[visits.experts[number]], visits, number, first, std::min(first + piece, gate.rows), a, a_up,
                        limit, hidden);
        }
    });

    if (asks && count > AHEAD) ask_for_downs(experts, visits);
    Activations h = rounded(hidden, t * k, gate.rows, wants(down), 0);
    piece = std::min(rows_per_piece(down.rows, down.cols * std::min<int64_t>(count, 8), visitors), int64_t(64));
    parallel(down.rows, piece, [&](int64_t begin, int64_t end) {
        for (int64_t number = 0; number < count; ++number)
            add_down(experts[visits.experts[number]], visits, number, begin, end, h, out);
    });
}

}  // namespace

// x [t, d], weights and chosen [t, k] (numbers below n) -> added to out [t, d], or alone in it if it is `fresh`. All experts have one shape and, part by part,
// one format.
DSV4_API void dsv4_add_experts(const float* x, int64_t t, const float* weights, const int64_t* chosen, int64_t k,
                               const void* all, int64_t n, float limit, int64_t fresh, float* out) {
    const Expert* experts = static_cast<const Expert*>(all);
    if (n > 1) {
        submit([=] { add_experts(x, t, weights, chosen, k, experts, n, limit, fresh, out); });
    } else {
        Expert only = *experts;
        submit([=] { add_experts(x, t, weights, chosen, k, &only, n, limit, fresh, out); });
    }
}
