// Products of a few or many tokens with one matrix, or with one matrix for each group.
#include <algorithm>
#include <vector>

#include "api.h"
#include "formats.h"
#include "pool.h"
#include "queue.h"

using namespace dsv4;

namespace {

void linear(const float* x, int64_t tokens, int64_t groups, const Weight& weight, float* y) {
    int64_t out = weight.rows / groups;
    Activations a = rounded(x, tokens * groups, weight.cols, wants(weight), 0);
    parallel(weight.rows, rows_per_piece(weight.rows, weight.cols, tokens), [&](int64_t begin, int64_t end) {
        while (begin < end) {  // a piece may reach into the next group
            int64_t group = begin / out, stop = std::min(end, (group + 1) * out), rows = stop - begin;
            Picked picked{tokens, group, groups};
            if (tokens == 1) {
                multiply(weight, begin, stop, a, picked, y + begin, rows);
            } else {
                // Rows of y lie a power of two apart, all in the same few places of the cache; those of a piece do not.
                thread_local std::vector<float> piece;
                piece.resize(std::max(piece.size(), size_t(tokens * rows)));
                multiply(weight, begin, stop, a, picked, piece.data(), rows);
                for (int64_t t = 0; t < tokens; ++t)
                    std::copy_n(piece.data() + t * rows, rows, y + t * weight.rows + begin);
            }
            begin = stop;
        }
    });
}

}  // namespace

// The look-up tables of the IQ formats: 256 points of eight and of four bytes.
DSV4_API void dsv4_set_grids(const uint8_t* iq2_xxs, const uint8_t* iq3_xxs) {
    iq2_xxs_grid.set(iq2_xxs);
    iq3_xxs_grid.set(iq3_xxs);
}

// x [tokens, groups, cols], weight [groups * out, cols] -> y [tokens, groups * out].
DSV4_API void dsv4_linear(const float* x, int64_t tokens, int64_t groups, const Weight* weight, float* y) {
    Weight w = *weight;  // may be gone when its turn comes; the matrix is not
    submit([=] { linear(x, tokens, groups, w, y); });
}
