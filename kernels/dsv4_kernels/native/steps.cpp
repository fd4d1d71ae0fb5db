// The rotation of a row's pairs.
#include "steps.h"

void dsv4::turn_pairs(float* x, const float* turns, int64_t pairs, float sign) {
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
        float a = x[2 * i], b = x[2 * i + 1], c = turns[2 * i], s = sign * turns[2 * i + 1];
        x[2 * i] = a * c - b * s;
        x[2 * i + 1] = a * s + b * c;
    }
}
