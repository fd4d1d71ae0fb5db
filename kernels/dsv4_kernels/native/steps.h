// Steps that kernels of several files take, row by row: what one of them alone would do, and what those do that join several.
#pragma once

#include <cmath>
#include <cstring>

#include "rows.h"

namespace dsv4 {

// x [d] over its root mean square, times weight [d] or nothing -> to, which may be x.
inline void norm_row(const float* x, const float* weight, int64_t d, float eps, float* to) {
    f32x8 factor = splat(1.0f / std::sqrt(sum_of_squares(x, d) / float(d) + eps));
    if (weight)
        by_eights(d, [&](int64_t i, auto part) { store(to + i, load(x + i, part) * factor * load(weight + i, part), part); });
    else
        by_eights(d, [&](int64_t i, auto part) { store(to + i, load(x + i, part) * factor, part); });
}

// Pairs of values, turned where they are by cosine and sine [pairs]; the other way round with sign -1. In a file of its own, so that
// no caller gets a version of it that adds in another order.
void turn_pairs(float* x, const float* turns, int64_t pairs, float sign);

// What official caches keep of a row [d], in place; see rounding.cpp. KV: FP8 in blocks of `block` but for the last `rotated` values, which become
// bf16; INDEX: the Hadamard turn, then FP4 in blocks.
enum Rounding : int64_t { NONE, KV, INDEX };
void round_row_for_cache(float* x, int64_t d, Rounding rounding, int64_t rotated, int64_t block);

}  // namespace dsv4
