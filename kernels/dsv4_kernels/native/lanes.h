// Many tokens with packed rows: four rows are unpacked into a tile, which then meets all tokens, some at a time.
//
// Weights and activations of each eight blocks lie in the order of lanes: vector p holds four weights of each block, in lane k
// those of block k. Lane k of a sum of products is then block k, and whole numbers become floats and meet their scales once for
// eight blocks instead of eight times. Where a block's halves have scales of their own, vectors 0 to 3 are the first halves and
// 4 to 7 the second ones. A row's last blocks, if fewer than eight, are filled up with zeros.
//
// One side of a product of bytes has no sign: weights are kept as RAISED more than they are, and what that is too much comes off
// as the whole number that a sum begins with. Where that leaves no room for a weight of eight bits, numbers and magnitudes are
// kept instead, whose signs move to the activations (SIGNED).
#pragma once

#include <algorithm>

#include "aligned.h"
#include "simd.h"
#include "weight.h"

namespace dsv4 {

constexpr int TILE = 4;                                         // rows that are unpacked together
constexpr int TOGETHER = REGISTERS >= 32 && ANY_BYTES ? 4 : 2;  // tokens that meet a tile at once: their sums stay in registers

// One token's row.
struct Lanes {
    const int8_t* q;
    const float* d;
    const int32_t *offsets, *first_offsets;
    const float* sums;  // of the parts that have a minimum each, `lows` of a block

    Lanes() = default;
    Lanes(const Activations& x, int64_t row, int lows)
        : q(x.lanes + row * whole_groups(x.cols) * 256), d(x.d + row * whole_groups(x.cols) * 8),
          offsets(x.offsets + row * whole_groups(x.cols) * 8), first_offsets(x.first_offsets + row * whole_groups(x.cols) * 8),
          sums(lows == 2 ? x.sum16 + row * (x.cols / 16) : x.sum32 + row * (x.cols / 32)) {}
};

// LOW: weights that have a minimum together, or 0.
template <bool HALVES, int LOW, int RAISED, bool SIGNED>
class Tile {
public:
    static constexpr int PARTS = HALVES ? 2 : 1;   // of a block, with a scale each
    static constexpr int LOWS = LOW ? 32 / LOW : 0;  // of a block

    explicit Tile(int64_t cols) : groups(whole_groups(cols)) {
        size_t bytes = size_t(groups) * TILE * ((SIGNED ? 512 : 256) + (PARTS + LOWS) * sizeof(f32x8));
        if (memory.size() < bytes) memory.resize(bytes);
        w = reinterpret_cast<uint8_t*>(memory.data());
        sizes = w + groups * TILE * 256;
        scales = reinterpret_cast<float*>(SIGNED ? sizes + groups * TILE * 256 : sizes);
        lows = scales + groups * TILE * PARTS * 8;
    }

    // Places of row r (in steps of TILE times as much): vector p of group g; scales of its blocks' parts; minima.
    DSV4_INLINE uint8_t* vector_of(int64_t g, int p, int r) const { return w + ((8 * g + p) * TILE + r) * 32; }
    DSV4_INLINE float* scales_of(int64_t g, int part, int r) const { return scales + ((PARTS * g + part) * TILE + r) * 8; }
    DSV4_INLINE float* lows_of(int64_t i, int r) const { return lows + (i * TILE + r) * 8; }

    // Eight blocks of row r, as they come, become group g.
    DSV4_INLINE void set(int64_t g, int r, const uint8_t* blocks) const {
        turned(blocks, [&](int p, u8x32 v) {
            store(vector_of(g, p, r), v);
            if constexpr (SIGNED) store(vector_of(g, p, r) + (sizes - w), magnitudes(i8x32(v)));
        });
    }

    // y[t][r] for TOKENS tokens.
    template <int TOKENS>
    DSV4_INLINE void multiply(const Lanes (&a)[TOKENS], float (&y)[TOKENS][TILE]) const {
        f32x8 totals[TOKENS][TILE] = {};
        for (int64_t g = 0; g < groups; ++g) {
            for (int part = 0; part < PARTS; ++part) add(a, g, part, totals);
            for (int i = 0; i < LOWS; ++i)
                for (int t = 0; t < TOKENS; ++t) {
                    f32x8 minus = -load<f32x8>(a[t].sums + (LOWS * g + i) * 8);
                    for (int r = 0; r < TILE; ++r)
                        totals[t][r] = fma(load<f32x8>(lows_of(LOWS * g + i, r)), minus, totals[t][r]);
                }
        }
        for (int t = 0; t < TOKENS; ++t)
            for (int r = 0; r < TILE; ++r) y[t][r] = sum(totals[t][r]);
    }

private:
    template <int TOKENS>
    DSV4_INLINE void add(const Lanes (&a)[TOKENS], int64_t g, int part, f32x8 (&totals)[TOKENS][TILE]) const {
        i32x8 sums[TOKENS][TILE];
        for (int t = 0; t < TOKENS; ++t) {
            i32x8 offset = too_much(a[t], g, part);
            for (int r = 0; r < TILE; ++r) sums[t][r] = offset;
        }
#pragma GCC unroll 8
        for (int p = 8 / PARTS * part; p < 8 / PARTS * (part + 1); ++p) {
            i8x32 q[TOKENS];
            for (int t = 0; t < TOKENS; ++t) q[t] = kept(load<i8x32>(a[t].q + 256 * g + 32 * p));
            for (int r = 0; r < TILE; ++r) {
                u8x32 v = kept(load<u8x32>(vector_of(g, p, r)));
                if constexpr (SIGNED) {
                    u8x32 size = load<u8x32>(vector_of(g, p, r) + (sizes - w));
                    for (int t = 0; t < TOKENS; ++t) sums[t][r] += dot(size, i8x32(v), q[t]);
                } else {
                    for (int t = 0; t < TOKENS; ++t) sums[t][r] = dot_unsigned(v, q[t], sums[t][r]);
                }
            }
        }
        for (int t = 0; t < TOKENS; ++t) {
            f32x8 d = load<f32x8>(a[t].d + 8 * g);
            for (int r = 0; r < TILE; ++r)
                totals[t][r] = fma(to_float(sums[t][r]), load<f32x8>(scales_of(g, part, r)) * d, totals[t][r]);
        }
    }

    static DSV4_INLINE i32x8 too_much(const Lanes& a, int64_t g, int part) {
        if constexpr (RAISED == 0) return i32x8{};
        i32x8 of_128 = load<i32x8>((HALVES ? a.first_offsets : a.offsets) + 8 * g);
        if (part == 1) of_128 = load<i32x8>(a.offsets + 8 * g) - of_128;
        return RAISED == 128 ? of_128 : (of_128 >> 7) * RAISED;
    }

    static thread_local Aligned<char> memory;
    int64_t groups;
    uint8_t *w, *sizes;    // [groups, 8, TILE, 32]
    float *scales, *lows;  // [groups, PARTS, TILE, 8], [groups, LOWS, TILE, 8]
};

template <bool HALVES, int LOW, int RAISED, bool SIGNED>
thread_local Aligned<char> Tile<HALVES, LOW, RAISED, SIGNED>::memory;

// A tile's first `rows` rows with TOKENS tokens, from picked[i] on.
template <int TOKENS, class T>
DSV4_INLINE void meet(const T& tile, int rows, const Activations& x, const Picked& picked, int64_t i, float* y, int64_t y_stride) {
    Lanes a[TOKENS];
    float found[TOKENS][TILE];
    for (int t = 0; t < TOKENS; ++t) a[t] = Lanes(x, picked[i + t], T::LOWS);
    tile.template multiply<TOKENS>(a, found);
    for (int t = 0; t < TOKENS; ++t) std::copy(found[t], found[t] + rows, y + (i + t) * y_stride);
}

// The same with all of them.
template <class T>
DSV4_INLINE void meet_all(const T& tile, int rows, const Activations& x, const Picked& picked, float* y, int64_t y_stride) {
    int64_t i = 0;
    for (; i + TOGETHER <= picked.count; i += TOGETHER) meet<TOGETHER>(tile, rows, x, picked, i, y, y_stride);
    for (; i + 1 < picked.count; i += 2) meet<2>(tile, rows, x, picked, i, y, y_stride);
    if (i < picked.count) meet<1>(tile, rows, x, picked, i, y, y_stride);
}

}  // namespace dsv4
