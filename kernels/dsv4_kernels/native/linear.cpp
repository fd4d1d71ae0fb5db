// Products of a few or many tokens with one matrix, or with one matrix for each group.
#include <algorithm>
#include <cmath>
#include <vector>

#include "api.h"
#include "planes.h"
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

// Several matrices with one x, as one piece of work: y of each behind those of the ones before. Kinds of matrices that want
// different activations and are more than there is memory for follow one another.
struct Matrices {
    static constexpr int MOST = 7;
    Weight all[MOST];
    int64_t count;
};

void linears(const float* x, int64_t tokens, const Matrices& matrices, float* y) {
    constexpr int SLOTS = 2;
    const Weight* all = matrices.all;
    int64_t n = matrices.count, firsts[Matrices::MOST + 1] = {}, pieces[Matrices::MOST];
    float* places[Matrices::MOST];
    Activations given[Matrices::MOST];
    int used = 0;
    for (int64_t i = 0; i < n; ++i) {
        places[i] = i ? places[i - 1] + all[i - 1].rows * tokens : y;
        int64_t like = 0;
        while (like < i && !same(wants(all[like]), wants(all[i]))) ++like;
        if (like == i && wants(all[i]).bytes && used == SLOTS) used = SLOTS + 1;
        if (tokens == 1 && used <= SLOTS)
            given[i] = like < i ? given[like] : rounded(x, 1, all[i].cols, wants(all[i]), wants(all[i]).bytes ? used++ : 0);
        pieces[i] = rows_per_piece(all[i].rows, all[i].cols, 1);
        firsts[i + 1] = firsts[i] + (all[i].rows + pieces[i] - 1) / pieces[i];
    }
    if (tokens > 1 || used > SLOTS) {
        for (int64_t i = 0; i < n; ++i) linear(x, tokens, 1, all[i], places[i]);
        return;
    }
    parallel(firsts[n], 1, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin, i = 0; piece < end; ++piece) {
            while (piece >= firsts[i + 1]) ++i;
            int64_t row = (piece - firsts[i]) * pieces[i], stop = std::min(row + pieces[i], all[i].rows);
            multiply(all[i], row, stop, given[i], Picked{1}, places[i] + row, stop - row);
        }
    });
}

// Who asks for a row that there is not gets an answer that nobody takes for one.
void embed(const int64_t* ids, int64_t t, const Weight& table, int64_t times, float* out) {
    int64_t d = table.cols;
    parallel(t, items_for(int64_t(1) << 14, d * times), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            float* first = out + i * times * d;
            if (ids[i] >= 0 && ids[i] < table.rows)
                widen(table, ids[i], first);
            else
                std::fill_n(first, d, NAN);
            for (int64_t copy = 1; copy < times; ++copy) std::copy_n(first, d, first + copy * d);
        }
    });
}

}  // namespace

// The look-up tables of the IQ formats: 256 points of eight and of four bytes.
DSV4_API void dsv4_set_grids(const uint8_t* iq2_xxs, const uint8_t* iq3_xxs) {
    iq2_xxs_grid.set(iq2_xxs);
#if DSV4_LOOKS_UP_MANY
    set_planes();
#endif
    iq3_xxs_grid.set(iq3_xxs);
}

// ids [t], table [vocab, d] -> out [t, times, d]: rows of the table, each so many times.
DSV4_API void dsv4_embed(const int64_t* ids, int64_t t, const Weight* table, int64_t times, float* out) {
    Weight w = *table;
    submit([=] { embed(ids, t, w, times, out); });
}

// x [tokens, groups, cols], weight [groups * out, cols] -> y [tokens, groups * out].
DSV4_API void dsv4_linear(const float* x, int64_t tokens, int64_t groups, const Weight* weight, float* y) {
    Weight w = *weight;  // may be gone when its turn comes; the matrix is not
    submit([=] { linear(x, tokens, groups, w, y); });
}

// x [tokens, cols], weights [n], each [rows, cols] -> y: [tokens, rows] of each in turn.
DSV4_API void dsv4_linears(const float* x, int64_t tokens, const Weight* weights, int64_t n, float* y) {
    while (n > 0) {
        Matrices some;
        some.count = std::min<int64_t>(n, Matrices::MOST);
        std::copy_n(weights, some.count, some.all);
        submit([=] { linears(x, tokens, some, y); });
        for (int64_t i = 0; i < some.count; ++i) y += weights[i].rows * tokens;
        weights += some.count;
        n -= some.count;
    }
}
