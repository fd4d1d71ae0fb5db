// Products of tokens with a matrix of few rows: a mixer of streams, a router's gate.
#pragma once

#include <algorithm>

#include "pool.h"
#include "weight.h"

namespace dsv4 {

constexpr int64_t SHORT = int64_t(1) << 15;  // products that take no longer than waking a second thread
constexpr int64_t TOKENS = 8;                // of a piece: the matrix passes by once for all of them

// y [tokens, rows] = x [tokens, cols] . weight [rows, cols]. Few tokens deal the rows to the threads, many tokens themselves;
// a token's result is the same either way.
inline void products(const float* x, int64_t tokens, const Weight& weight, float* y) {
    if (tokens == 0) return;
    Activations a = rounded(x, tokens, weight.cols, wants(weight), 0);
    if (tokens >= TOKENS * threads()) {
        int64_t piece = std::max(TOKENS, items_for(SHORT, weight.rows * weight.cols));
        parallel(tokens, piece, [&](int64_t begin, int64_t end) {
            for (; begin < end; begin += TOKENS)
                multiply(weight, 0, weight.rows, a, Picked{std::min(TOKENS, end - begin), begin}, y + begin * weight.rows,
                         weight.rows);
        });
        return;
    }
    int64_t piece = items_for(SHORT, weight.cols * tokens);
    parallel(weight.rows, piece, [&](int64_t begin, int64_t end) {
        multiply(weight, begin, end, a, Picked{tokens}, y + begin, weight.rows);
    });
}

}  // namespace dsv4
