// Matrix products on packed rows. A few tokens: each row is unpacked in registers and met with each token at once. Many
// tokens: four rows are unpacked into a tile (see lanes.h), which then meets all tokens. Either way a token's result depends
// neither on how many came with it nor on where rows were cut; but a tile adds bytes' products in another order than a row, so
// it does depend on whether few came or many, as far as the order of float32 sums goes.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "floats.h"
#include "formats.h"
#include "lanes.h"
#include "planes.h"
#include "pool.h"
#include "quads.h"

namespace dsv4 {

Grid<8, 2> iq2_xxs_grid;
Grid<4, 3> iq3_xxs_grid;

namespace {

Row row_of(const Weight& w, int64_t row) {
    const uint8_t* scales = w.scales ? w.scales + row * w.scale_cols * (w.float_scales ? 4 : 1) : nullptr;
    return {w.data + row * w.row_bytes, scales, w.float_scales != 0};
}

// Scales of weights, as a sink that keeps rows of weights wants them.
struct AsTheyAre {
    DSV4_INLINE float scaled(int64_t, float scale) const { return scale; }
    DSV4_INLINE f32x8 scaled(int64_t, f32x8 scales) const { return scales; }
    DSV4_INLINE f32x8 scaled_halves(int64_t, f32x8 scales) const { return scales; }
    DSV4_INLINE float one_of(f32x8 scales, int j) const { return scales[j]; }
};

// The other ways to put weights, for a sink `Self` that has `put` and wants them signed.
template <class Self, int ABOVE>
struct Signed {
    template <class S>
    DSV4_INLINE void put_unsigned(int64_t k, u8x32 v, S scale) { self().put(k, i8x32(v), scale); }
    template <class S>
    DSV4_INLINE void put_above(int64_t k, u8x32 v, S scale) { self().put(k, i8x32(v - uint8_t(ABOVE)), scale); }
    template <class S>
    DSV4_INLINE void put_signed(int64_t k, u8x32 size, uint32_t minus, S scale) {
        self().put(k, negate(i8x32(size), minus), scale);
    }

private:
    DSV4_INLINE Self& self() { return static_cast<Self&>(*this); }
};

DSV4_INLINE f32x8 spread(float factor) { return splat(factor); }
DSV4_INLINE f32x8 spread(f32x8 factor) { return factor; }

// One token's row of bytes.
struct Bytes {
    const int8_t* q;
    const float *d, *sums;

    template <class F>
    static Bytes of(const Activations& x, int64_t row) {
        const float* sums = F::LOW == 16 ? x.sum16 + row * (x.cols / 16) : x.sum32 + row * (x.cols / 32);
        return {x.q + row * x.cols, x.d + row * whole_groups(x.cols) * 8, F::LOW ? sums : nullptr};
    }
};

// Two sums, for even and odd blocks: a single one would have to wait for itself.
//
// What bytes are too great by comes off before the products are summed, as whole numbers; rows side by side share what it is.
template <int ABOVE>
struct Dot {
    Bytes a;
    f32x8 even = {}, odd = {}, below = {};

    DSV4_INLINE void add(int64_t k, i32x8 products, f32x8 factor) {
        if (k & 1)
            odd = fma(to_float(products), factor, odd);
        else
            even = fma(to_float(products), factor, even);
    }
    DSV4_INLINE i8x32 block(int64_t k) const { return load<i8x32>(a.q + 32 * k); }

    // Numbers that come from memory are spread on the way, so both are before they meet.
    DSV4_INLINE f32x8 scaled(int64_t k, float scale) const { return splat(scale) * splat(a.d[k]); }
    DSV4_INLINE f32x8 scaled(int64_t k, f32x8 scales) const { return scales * load<f32x8>(a.d + k); }
    DSV4_INLINE f32x8 scaled_halves(int64_t k, f32x8 scales) const { return scales * twice(a.d + k); }
    DSV4_INLINE f32x8 one_of(f32x8 factors, int j) const { return lane(factors, j); }

    template <class S>
    DSV4_INLINE void put(int64_t k, i8x32 w, S factor) { add(k, dot(w, block(k)), spread(factor)); }
    template <class S>
    DSV4_INLINE void put_unsigned(int64_t k, u8x32 w, S factor) { add(k, dot_unsigned(w, block(k)), spread(factor)); }
    template <class S>
    DSV4_INLINE void put_above(int64_t k, u8x32 w, S factor) {
        add(k, dot_unsigned(w, block(k), -dot_unsigned(u8x32{} + uint8_t(ABOVE), block(k))), spread(factor));
    }
    template <class S>
    DSV4_INLINE void put_signed(int64_t k, u8x32 size, uint32_t minus, S factor) {
        add(k, dot_unsigned(size, negate(block(k), minus)), spread(factor));
    }
    DSV4_INLINE void low(int64_t i, f32x8 m) { below = fma(m, load<f32x8>(a.sums + 8 * i), below); }
    float total() const { return sum(even + odd) - sum(below); }
};

// How much more than they are a tile keeps weights, so that they are bytes without a sign.
template <class F>
constexpr int RAISED = F::LOW ? 0 : ANY_BYTES ? 128 : F::PREPARED ? 64 : F::ABOVE;

template <class F>
using TileOf = Tile<F::HALVES, F::LOW, RAISED<F>, !F::LOW && !RAISED<F>>;

// Row r of a tile, as it is unpacked: bytes first as they come, since eight blocks are turned at once.
template <class F>
struct RowOfTile : Signed<RowOfTile<F>, F::ABOVE> {
    const TileOf<F>& tile;
    int r;
    uint8_t* bytes;  // [cols]
    float* steps;    // [cols / 16], where halves have scales of their own

    DSV4_INLINE float scaled(int64_t k, float scale) const { return tile.scales_of(k / 8, 0, r)[k % 8] = scale; }
    DSV4_INLINE f32x8 scaled(int64_t k, f32x8 scales) const {
        store(tile.scales_of(k / 8, 0, r), scales);
        return scales;
    }
    DSV4_INLINE f32x8 scaled_halves(int64_t k, f32x8 scales) const {
        store(steps + 2 * k, scales);
        return scales;
    }
    DSV4_INLINE float one_of(f32x8, int) const { return 0.0f; }  // all of them are kept already

    template <class S>
    DSV4_INLINE void put(int64_t k, i8x32 v, S) { store(bytes + 32 * k, u8x32(v) + uint8_t(RAISED<F>)); }
    DSV4_INLINE void low(int64_t i, f32x8 m) { store(tile.lows_of(i, r), m); }
};

template <class F>
void unpack(const TileOf<F>& tile, int r, const Row& row, int64_t cols, const uint8_t* next) {
    thread_local Aligned<char> memory;
    int64_t blocks = cols / 32, groups = whole_groups(cols);
    if (memory.size() < size_t(groups) * (256 + 64)) memory.resize(size_t(groups) * (256 + 64));
    uint8_t* bytes = reinterpret_cast<uint8_t*>(memory.data());
    RowOfTile<F> sinks[1] = {{{}, tile, r, bytes, reinterpret_cast<float*>(bytes + groups * 256)}};
    Row rows[1] = {row};
    visit<F>(rows, cols, sinks, next);
    for (int64_t g = 0; g < groups; ++g) {
        tile.set(g, r, bytes + 256 * g);
        if constexpr (F::HALVES) apart(sinks[0].steps + 16 * g, tile.scales_of(g, 0, r), tile.scales_of(g, 1, r));
    }
    for (int64_t k = blocks; k < 8 * groups; ++k) sinks[0].scaled(k, 0.0f);
}

// ROWS rows from `first` on with one token.
template <class F, int ROWS>
DSV4_INLINE void dots(const Weight& weight, int64_t first, const Bytes& a, float* y) {
    Row rows[ROWS];
    for (int r = 0; r < ROWS; ++r) rows[r] = row_of(weight, first + r);
#if DSV4_64_BYTES
    if constexpr (std::is_same_v<F, Q2_KFormat>) {
        dots_of_quads(rows, weight.cols, a.q, a.d, a.sums, behind(weight, first, ROWS), y);
        return;
    }
#endif
    Dot<F::ABOVE> found[ROWS];
    for (int r = 0; r < ROWS; ++r) found[r].a = a;
    visit<F>(rows, weight.cols, found, behind(weight, first, ROWS));
    for (int r = 0; r < ROWS; ++r) y[r] = found[r].total();
}

template <class F>
void multiply_few(const Weight& weight, int64_t begin, int64_t end, const Activations& x, const Picked& picked, float* y,
                  int64_t y_stride) {
    int64_t row = begin;
    for (; row + F::ROWS <= end; row += F::ROWS)
        for (int64_t i = 0; i < picked.count; ++i)
            dots<F, F::ROWS>(weight, row, Bytes::of<F>(x, picked[i]), y + i * y_stride + row - begin);
    for (; row < end; ++row)
        for (int64_t i = 0; i < picked.count; ++i)
            dots<F, 1>(weight, row, Bytes::of<F>(x, picked[i]), y + i * y_stride + row - begin);
}

// Apart from the rest: the compiler makes less of what is done for one token where so much code stands beside it.
template <class F>
__attribute__((noinline)) void multiply_many(const Weight& weight, int64_t begin, int64_t end, const Activations& x,
                                             const Picked& picked, float* y, int64_t y_stride) {
    TileOf<F> tile(weight.cols);
    for (int64_t row = begin; row < end; row += TILE) {
        for (int r = 0; r < TILE; ++r) {  // what the last tile has too many is the last row again
            int64_t number = std::min(row + r, end - 1);
            unpack<F>(tile, r, row_of(weight, number), weight.cols, behind(weight, number, 1));
        }
        meet_all(tile, int(std::min<int64_t>(TILE, end - row)), x, picked, y + row - begin, y_stride);
    }
}

// MANY: the format as a tile takes it.
template <class F, class MANY>
void multiply_bytes(const Weight& weight, int64_t begin, int64_t end, const Activations& x, const Picked& picked, float* y,
                    int64_t y_stride) {
    bool few = picked.count <= FEW || !x.lanes;  // a token may be picked more than once
    (few ? multiply_few<F> : multiply_many<MANY>)(weight, begin, end, x, picked, y, y_stride);
}

// ---- Formats whose weights are floats, multiplied with the activations as they are ----

constexpr int64_t SPAN = 128;  // columns under one scale of FP8; the others have none and count as 1

DSV4_INLINE float span_scale(const Weight& w, int64_t row, int64_t span) {
    if (!w.scales) return 1.0f;
    int64_t at = row / SPAN * w.scale_cols + span;
    return w.float_scales ? load<float>(w.scales + 4 * at) : e8m0(w.scales[at]);
}

// The sum over `cols` columns of up to TOKENS rows of x, each weight read and widened once.
template <class F, int TOKENS>
DSV4_INLINE void dot_floats(const Weight& w, int64_t row, const float* const* x, float* y) {
    f32x8 total[TOKENS] = {};
    float rest[TOKENS] = {};
    for (int64_t start = 0, span = 0; start < w.cols; start += SPAN, ++span) {
        int64_t stop = std::min(start + SPAN, w.cols), i = start;
        const uint8_t* data = w.data + row * w.row_bytes;
        f32x8 parts[4][TOKENS] = {};  // a single sum would have to wait for itself
        for (; i + 32 <= stop; i += 32)
            for (int j = 0; j < 4; ++j) {
                f32x8 eight = F::eight(data + (i + 8 * j) * F::BYTES);
                for (int t = 0; t < TOKENS; ++t) parts[j][t] = fma(eight, load<f32x8>(x[t] + i + 8 * j), parts[j][t]);
            }
        for (; i + 8 <= stop; i += 8)
            for (int t = 0; t < TOKENS; ++t)
                parts[0][t] = fma(F::eight(data + i * F::BYTES), load<f32x8>(x[t] + i), parts[0][t]);
        float scale = span_scale(w, row, span);
        for (int t = 0; t < TOKENS; ++t) {
            f32x8 part = (parts[0][t] + parts[1][t]) + (parts[2][t] + parts[3][t]);
            total[t] = fma(part, splat(scale), total[t]);
        }
        for (; i < stop; ++i)
            for (int t = 0; t < TOKENS; ++t) rest[t] += scale * F::one(data + i * F::BYTES) * x[t][i];
    }
    for (int t = 0; t < TOKENS; ++t) y[t] = sum(total[t]) + rest[t];
}

template <class F>
void multiply_floats(const Weight& w, int64_t begin, int64_t end, const Activations& x, const Picked& picked, float* y,
                     int64_t y_stride) {
    constexpr int TOKENS = 4;
    for (int64_t row = begin; row < end; ++row) {
        int64_t i = 0;
        for (; i + TOKENS <= picked.count; i += TOKENS) {
            const float* rows[TOKENS];
            float found[TOKENS];
            for (int t = 0; t < TOKENS; ++t) rows[t] = x.x + picked[i + t] * x.cols;
            dot_floats<F, TOKENS>(w, row, rows, found);
            for (int t = 0; t < TOKENS; ++t) y[(i + t) * y_stride + row - begin] = found[t];
        }
        for (; i < picked.count; ++i) {
            const float* one = x.x + picked[i] * x.cols;
            dot_floats<F, 1>(w, row, &one, y + i * y_stride + row - begin);
        }
    }
}

template <class F>
void widen_floats(const Weight& w, int64_t row, float* to) {
    const uint8_t* data = w.data + row * w.row_bytes;
    for (int64_t start = 0, span = 0; start < w.cols; start += SPAN, ++span) {
        int64_t stop = std::min(start + SPAN, w.cols), i = start;
        float scale = span_scale(w, row, span);
        for (; i + 8 <= stop; i += 8) store(to + i, F::eight(data + i * F::BYTES) * splat(scale));
        for (; i < stop; ++i) to[i] = F::one(data + i * F::BYTES) * scale;
    }
}

// ---- Byte formats whose products may not round the activations: each row is widened to floats ----

template <class F>
struct Floats : AsTheyAre, Signed<Floats<F>, F::ABOVE> {
    float *row, *lows;  // [cols], [cols / LOW]

    template <class S>
    DSV4_INLINE void put(int64_t k, i8x32 w, S scale) {
        float* to = row + 32 * k;
        for (int i = 0; i < 32; ++i) {
            int place = !F::SPLIT ? i : i < 16 ? 2 * i : 2 * i - 31;
            to[place] = float(w[i]) * of_half(scale, i / 16);
        }
    }
    DSV4_INLINE void low(int64_t i, f32x8 m) { store(lows + 8 * i, m); }

    void finish(int64_t cols) {
        if constexpr (F::LOW != 0)
            for (int64_t c = 0; c < cols; ++c) row[c] -= lows[c / F::LOW];
    }

private:
    static DSV4_INLINE float of_half(float scale, int) { return scale; }
    static DSV4_INLINE float of_half(f32x8 scale, int half) { return scale[4 * half]; }
};

template <class F>
void widen_bytes(const Weight& weight, int64_t row, float* to) {
    thread_local std::vector<float> lows;
    lows.resize(std::max(lows.size(), size_t(F::LOW ? weight.cols / F::LOW : 0)));
    Floats<F> floats[1] = {{{}, {}, to, lows.data()}};
    Row packed[1] = {row_of(weight, row)};
    visit<F>(packed, weight.cols, floats, behind(weight, row, 1));
    floats[0].finish(weight.cols);
}

template <class F>
void multiply_exactly(const Weight& weight, int64_t begin, int64_t end, const Activations& x, const Picked& picked, float* y,
                      int64_t y_stride) {
    thread_local std::vector<float> wide;
    wide.resize(std::max(wide.size(), size_t(weight.cols)));
    Weight one{reinterpret_cast<const uint8_t*>(wide.data()), nullptr, 1, weight.cols, weight.cols * 4, 0, F32, 0, 0};
    for (int64_t row = begin; row < end; ++row) {
        widen_bytes<F>(weight, row, wide.data());
        multiply_floats<F32Format>(one, 0, 1, x, picked, y + row - begin, y_stride);
    }
}

using Multiply = void(const Weight&, int64_t, int64_t, const Activations&, const Picked&, float*, int64_t);
using Widen = void(const Weight&, int64_t, float*);

struct Kind {
    Wants wants;
    Multiply *usual, *exact;
    Widen* widen;
};

constexpr Wants AS_THEY_ARE = {false, Order::PLAIN, false};

template <class F, class MANY = F>
constexpr Kind bytes() {
    return {{true, F::SPLIT ? Order::SPLIT : Order::PLAIN, F::LOW != 0}, multiply_bytes<F, MANY>, multiply_exactly<F>,
            widen_bytes<F>};
}

#if DSV4_LOOKS_UP_MANY
constexpr Kind IQ2_XXS_KIND = {{true, Order::PLANES, false}, multiply_planes, multiply_exactly<IQ2_XXSFormat>,
                                widen_bytes<IQ2_XXSFormat>};
#else
constexpr Kind IQ2_XXS_KIND = bytes<IQ2_XXSFormat>();
#endif

template <class F>
constexpr Kind floats() {
    return {AS_THEY_ARE, multiply_floats<F>, multiply_floats<F>, widen_floats<F>};
}

const Kind kinds[FORMATS] = {  // in the order of enum Format
    floats<F32Format>(), floats<F16Format>(), floats<BF16Format>(), floats<FP8Format>(), bytes<Q8_0Format>(),
    bytes<MXFP4Format>(), bytes<FP4Format>(), bytes<Q2_KFormat, Q2_KProductsFormat>(), bytes<Q3_KFormat>(), bytes<Q4_KFormat>(),
    bytes<Q5_KFormat>(), bytes<Q6_KFormat>(), IQ2_XXS_KIND, bytes<IQ3_XXSFormat>()};

}  // namespace

Wants wants(const Weight& weight) { return weight.exact ? AS_THEY_ARE : kinds[weight.format].wants; }

void multiply(const Weight& weight, int64_t begin, int64_t end, const Activations& x, const Picked& picked, float* y,
              int64_t y_stride) {
    const Kind& kind = kinds[weight.format];
    (weight.exact ? kind.exact : kind.usual)(weight, begin, end, x, picked, y, y_stride);
}

void widen(const Weight& weight, int64_t row, float* to) { kinds[weight.format].widen(weight, row, to); }

int64_t rows_per_piece(int64_t rows, int64_t cols, int64_t tokens) {
    int64_t enough = std::max<int64_t>(1, (int64_t(1) << 16) / std::max<int64_t>(1, cols * tokens));
    int64_t fair = std::max<int64_t>(1, rows / (8 * threads()));
    int64_t piece = std::min(std::max(enough, std::min<int64_t>(fair, 64)), rows);
    return (piece + TILE - 1) / TILE * TILE;
}

}  // namespace dsv4
