// How each block format unpacks: a `unit` of a row, BYTES bytes that are UNIT weights, tells a sink, 32 weights at a time, their
// bytes and their scale; `visit` walks along ROWS rows side by side, so that what is loaded of a token serves each of them.
//
// A sink has six verbs, and wants even and odd k in turn, so that the compiler can tell them apart. put(k, w, factor): block k
// is factor * w with signed bytes w. put_unsigned: the same with bytes 0..63. put_above: with bytes that are ABOVE too great.
// put_signed: magnitudes and a bit where the sign is minus. A factor is what `scaled` makes of a scale: scaled(k, float) of
// one, scaled(k, f32x8) of those of eight blocks from k on, among which one_of picks, scaled_halves(k, f32x8) of four blocks
// whose halves have scales of their own (HALVES; the factor of a block is then a vector). low(i, m): weights of group i of
// eight sub-blocks lie m below what was put.
//
// Layouts are those of GGUF and of the official checkpoints; see the decoders in dsv4_quant.formats.
#pragma once

#include "grids.h"
#include "simd.h"
#include "weight.h"

namespace dsv4 {

struct Row {
    const uint8_t* data;
    const uint8_t* scales;
    bool float_scales;
};

// body(k) for each block of a row; even and odd ones stand apart in the code.
template <class Body>
DSV4_INLINE void in_pairs(int64_t blocks, Body&& body) {
    int64_t k = 0;
    for (; k + 1 < blocks; k += 2) {
        body(k);
        body(k + 1);
    }
    if (k < blocks) body(k);
}

// Asks for what a thread reads soon, in the order of its addresses: not as rows side by side are read. Few blocks fit into
// the processor's window, and its own prefetcher halts at every page.
template <int BYTES>
DSV4_INLINE void fetch(const uint8_t* from) {
#pragma GCC unroll 16
    for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(from + i);
}

constexpr int64_t AHEAD = 4096;  // bytes between what is multiplied and what is asked for, if not more

// What is asked for while `rows` rows from `row` on are multiplied.
inline const uint8_t* behind(const Weight& w, int64_t row, int64_t rows) {
    return w.data + row * w.row_bytes + std::max(rows * w.row_bytes, AHEAD);
}

// Rows that follow one another in memory, each to a sink of its own; `next` is where reading goes on.
template <class F, int ROWS, class Sink>
DSV4_INLINE void visit(const Row (&rows)[ROWS], int64_t cols, Sink (&sinks)[ROWS], const uint8_t* next) {
    constexpr int STEP = ROWS * F::BYTES;
    if constexpr (F::PREPARED) {
        static_assert(ROWS == 1, "such a row is busy enough");
        F::visit(rows[0], cols, sinks[0], next);
    } else if constexpr (F::UNIT == 32) {
        in_pairs(cols / F::UNIT, [&](int64_t i) {
            if (i % 2 == 0) fetch<2 * STEP>(next + i * STEP);
            for (int r = 0; r < ROWS; ++r) F::unit(rows[r], i, sinks[r]);
        });
    } else {
        for (int64_t i = 0; i < cols / F::UNIT; ++i) {
            fetch<STEP>(next + i * STEP);
            for (int r = 0; r < ROWS; ++r) F::unit(rows[r], i, sinks[r]);
        }
    }
}

struct Q8_0Format {
    static constexpr bool HALVES = false, SPLIT = false, PREPARED = false;
    static constexpr int LOW = 0, ABOVE = ANY_BYTES ? 128 : 0, BYTES = 34, UNIT = 32, ROWS = 1;

    template <class Sink>
    static DSV4_INLINE void unit(const Row& row, int64_t k, Sink& sink) {
        const uint8_t* b = row.data + BYTES * k;
        if constexpr (ANY_BYTES)  // a sign less to move to the activations
            sink.put_above(k, load<u8x32>(b + 2) ^ uint8_t(128), sink.scaled(k, half_at(b)));
        else
            sink.put(k, load<i8x32>(b + 2), sink.scaled(k, half_at(b)));
    }
};

// Codes 0 .5 1 1.5 2 3 4 6 and their negatives, doubled to be whole and raised by 12; the scale is halved instead.
constexpr u8x16 E2M1 = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct MXFP4Format {
    static constexpr bool HALVES = false, SPLIT = false, PREPARED = false;
    static constexpr int LOW = 0, ABOVE = 12, BYTES = 17, UNIT = 32, ROWS = 4;

    template <class Sink>
    static DSV4_INLINE void unit(const Row& row, int64_t k, Sink& sink) {
        const uint8_t* b = row.data + BYTES * k;
        sink.put_above(k, look_up_nibbles(E2M1, b + 1), sink.scaled(k, HALF_E8M0.of[*b]));
    }
};

struct FP4Format {
    static constexpr bool HALVES = false, SPLIT = true, PREPARED = false;  // a byte holds neighbours: its nibbles are evens and odds
    static constexpr int LOW = 0, ABOVE = 12, BYTES = 16, UNIT = 32, ROWS = 4;

    template <class Sink>
    static DSV4_INLINE void unit(const Row& row, int64_t k, Sink& sink) {
        const uint8_t* b = row.data + BYTES * k;
        float scale = row.float_scales ? 0.5f * load<float>(row.scales + 4 * k) : HALF_E8M0.of[row.scales[k]];
        sink.put_above(k, look_up_nibbles(E2M1, b), sink.scaled(k, scale));
    }
};

DSV4_INLINE f32x8 bytes_to_floats(uint64_t bytes) {
    return to_float(widen_unsigned(load<u8x8>(&bytes)));
}

DSV4_INLINE f32x8 signed_bytes_to_floats(const uint8_t* from) {
    return to_float(widen_signed(load<i8x8>(from)));
}

// Twelve bytes that hold eight scales and eight minima of six bits, as Q4_K and Q5_K pack them; a byte each.
struct SixBits {
    uint64_t scales, lows;

    explicit DSV4_INLINE SixBits(const uint8_t* from) {
        uint32_t a = load<uint32_t>(from), b = load<uint32_t>(from + 4), c = load<uint32_t>(from + 8);
        scales = (a & 0x3f3f3f3fu) | uint64_t((c & 0x0f0f0f0fu) | (a >> 2 & 0x30303030u)) << 32;
        lows = (b & 0x3f3f3f3fu) | uint64_t((c >> 4 & 0x0f0f0f0fu) | (b >> 2 & 0x30303030u)) << 32;
    }
};

struct Q4_KFormat {
    static constexpr bool HALVES = false, SPLIT = false, PREPARED = false;
    static constexpr int LOW = 32, ABOVE = 0, BYTES = 144, UNIT = 256, ROWS = 2;

    template <class Sink>
    static DSV4_INLINE void unit(const Row& row, int64_t s, Sink& sink) {
        const uint8_t* b = row.data + BYTES * s;
        SixBits six(b + 4);
        f32x8 scales = sink.scaled(8 * s, bytes_to_floats(six.scales) * splat(half_at(b)));
        sink.low(s, bytes_to_floats(six.lows) * splat(half_at(b + 2)));
        for (int j = 0; j < 4; ++j) {
            u8x32 pairs = load<u8x32>(b + 16 + 32 * j);
            sink.put_unsigned(8 * s + 2 * j, field<0>(pairs, 15), sink.one_of(scales, 2 * j));
            sink.put_unsigned(8 * s + 2 * j + 1, field<4>(pairs, 15), sink.one_of(scales, 2 * j + 1));
        }
    }
};

struct Q5_KFormat {
    static constexpr bool HALVES = false, SPLIT = false, PREPARED = false;
    static constexpr int LOW = 32, ABOVE = 0, BYTES = 176, UNIT = 256, ROWS = 2;

    template <class Sink>
    static DSV4_INLINE void unit(const Row& row, int64_t s, Sink& sink) {
        const uint8_t* b = row.data + BYTES * s;
        SixBits six(b + 4);
        f32x8 scales = sink.scaled(8 * s, bytes_to_floats(six.scales) * splat(half_at(b)));
        sink.low(s, bytes_to_floats(six.lows) * splat(half_at(b + 2)));
        u8x32 fifth = load<u8x32>(b + 16);
        for (int j = 0; j < 4; ++j) {
            u8x32 pairs = load<u8x32>(b + 48 + 32 * j);
            u8x32 low = field<0>(pairs, 15) | bits<u8x32>(bits<u32x8>(field<0>(fifth, 1)) << 4);
            u8x32 high = field<4>(pairs, 15) | bits<u8x32>(bits<u32x8>(field<1>(fifth, 1)) << 4);
            sink.put_unsigned(8 * s + 2 * j, low, sink.one_of(scales, 2 * j));
            sink.put_unsigned(8 * s + 2 * j + 1, high, sink.one_of(scales, 2 * j + 1));
            fifth = bits<u8x32>(bits<u32x8>(fifth) >> 2);  // what crosses into a neighbour is masked away above
        }
    }
};

struct Q6_KFormat {
    static constexpr bool HALVES = true, SPLIT = false, PREPARED = false;
    static constexpr int LOW = 0, ABOVE = 32, BYTES = 210, UNIT = 256, ROWS = 2;

    template <class Sink>
    static DSV4_INLINE void unit(const Row& row, int64_t s, Sink& sink) {
        const uint8_t* b = row.data + BYTES * s;
        f32x8 d = splat(half_at(b + 208));
        for (int half = 0; half < 2; ++half) {
            f32x8 steps = sink.scaled_halves(8 * s + 4 * half, signed_bytes_to_floats(b + 192 + 8 * half) * d);
            u8x32 first = load<u8x32>(b + 64 * half), second = load<u8x32>(b + 64 * half + 32);
            u8x32 upper = load<u8x32>(b + 128 + 32 * half);
            u8x32 codes[4] = {field<0>(first, 15) | bits<u8x32>(bits<u32x8>(field<0>(upper, 3)) << 4),
                              field<0>(second, 15) | bits<u8x32>(bits<u32x8>(field<2>(upper, 3)) << 4),
                              field<4>(first, 15) | bits<u8x32>(bits<u32x8>(field<4>(upper, 3)) << 4),
                              field<4>(second, 15) | bits<u8x32>(bits<u32x8>(field<6>(upper, 3)) << 4)};
            for (int j = 0; j < 4; ++j) sink.put_above(8 * s + 4 * half + j, codes[j], halves_of(steps, j));
        }
    }
};

struct Q3_KFormat {
    static constexpr bool HALVES = true, SPLIT = false, PREPARED = false;
    static constexpr int LOW = 0, ABOVE = 4, BYTES = 110, UNIT = 256, ROWS = 2;

    template <class Sink>
    static DSV4_INLINE void unit(const Row& row, int64_t s, Sink& sink) {
        const uint8_t* b = row.data + BYTES * s;
        f32x8 d = splat(half_at(b + 108));
        f32x8 steps[2];
        scales(b + 96, d, steps);
        for (int half = 0; half < 2; ++half) steps[half] = sink.scaled_halves(8 * s + 4 * half, steps[half]);
        u8x32 third = load<u8x32>(b);  // a bit that is clear takes 4 away
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            u8x32 pairs = load<u8x32>(b + 32 + 32 * (j / 4));
            u8x32 code = bits<u8x32>(bits<u32x8>(pairs) >> (2 * (j % 4))) & 3;
            u8x32 upper = bits<u8x32>(bits<u32x8>(third) >> j) & 1;
            sink.put_above(8 * s + j, code | bits<u8x32>(bits<u32x8>(upper) << 2), halves_of(steps[j / 4], j % 4));
        }
    }

    // Sixteen scales of six bits, less 32: low nibbles in eight bytes, the upper two bits in the last four.
    static DSV4_INLINE void scales(const uint8_t* from, f32x8 d, f32x8* steps) {
        uint32_t a = load<uint32_t>(from), b = load<uint32_t>(from + 4), upper = load<uint32_t>(from + 8);
        auto both = [](uint32_t low, uint32_t high) { return low | uint64_t(high) << 32; };
        uint64_t first = both((a & 0x0f0f0f0fu) | (upper << 4 & 0x30303030u), (b & 0x0f0f0f0fu) | (upper << 2 & 0x30303030u));
        uint64_t second = both((a >> 4 & 0x0f0f0f0fu) | (upper & 0x30303030u), (b >> 4 & 0x0f0f0f0fu) | (upper >> 2 & 0x30303030u));
        steps[0] = (bytes_to_floats(first) - 32.0f) * d;
        steps[1] = (bytes_to_floats(second) - 32.0f) * d;
    }
};

constexpr uint64_t LOW_NIBBLES = 0x0f0f0f0f0f0f0f0fu;

struct Q2_KFormat {
    static constexpr bool HALVES = true, SPLIT = false, PREPARED = false;
    static constexpr int LOW = 16, ABOVE = 0, BYTES = 84, UNIT = 256, ROWS = IN_64_BYTES ? 4 : 2;

    template <class Sink>
    static DSV4_INLINE void unit(const Row& row, int64_t s, Sink& sink) {
        const uint8_t* b = row.data + BYTES * s;
        uint64_t first = load<uint64_t>(b), second = load<uint64_t>(b + 8);
        f32x8 d = splat(half_at(b + 80)), d_low = splat(half_at(b + 82));
        f32x8 steps[2] = {sink.scaled_halves(8 * s, bytes_to_floats(first & LOW_NIBBLES) * d),
                          sink.scaled_halves(8 * s + 4, bytes_to_floats(second & LOW_NIBBLES) * d)};
        sink.low(2 * s, bytes_to_floats(first >> 4 & LOW_NIBBLES) * d_low);
        sink.low(2 * s + 1, bytes_to_floats(second >> 4 & LOW_NIBBLES) * d_low);
        for (int half = 0; half < 2; ++half) {
            u8x32 quads = load<u8x32>(b + 16 + 32 * half);
            u8x32 codes[4] = {field<0>(quads, 3), field<2>(quads, 3), field<4>(quads, 3), field<6>(quads, 3)};
            for (int j = 0; j < 4; ++j) sink.put_unsigned(8 * s + 4 * half + j, codes[j], halves_of(steps[half], j));
        }
    }
};

// The same with each weight times the scale of its sixteen, which is a small whole number too: what is left of scales is one for
// all 256. For tiles, where many tokens have the good of it.
struct Q2_KProductsFormat {
    static constexpr bool HALVES = false, SPLIT = false, PREPARED = false;
    static constexpr int LOW = 16, ABOVE = 0, BYTES = 84, UNIT = 256, ROWS = 1;

    template <class Sink>
    static DSV4_INLINE void unit(const Row& row, int64_t s, Sink& sink) {
        constexpr u8x32 SECOND = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
        const uint8_t* b = row.data + BYTES * s;
        f32x8 factors = sink.scaled(8 * s, splat(half_at(b + 80))), d_low = splat(half_at(b + 82));
        u8x16 both = load<u8x16>(b), scales = both & 15;
        uint64_t lows[2] = {load<uint64_t>(b) >> 4 & LOW_NIBBLES, load<uint64_t>(b + 8) >> 4 & LOW_NIBBLES};
        for (int half = 0; half < 2; ++half) {
            sink.low(2 * s + half, bytes_to_floats(lows[half]) * d_low);
            u8x32 quads = load<u8x32>(b + 16 + 32 * half);
            u8x32 codes[4] = {field<0>(quads, 3), field<2>(quads, 3), field<4>(quads, 3), field<6>(quads, 3)};
            for (int j = 0; j < 4; ++j) {
                // Two bytes at a time: no product is above 45, so nothing runs over from one into the other.
                u8x32 each = look_up(scales, SECOND + uint8_t(8 * half + 2 * j));
                u16x16 products = bits<u16x16>(codes[j]) * (bits<u16x16>(each) & 255);
                sink.put_unsigned(8 * s + 4 * half + j, bits<u8x32>(products), sink.one_of(factors, 4 * half + j));
            }
        }
    }
};

// Eight blocks of an IQ format, ready to be met: sizes of weights, signs (32 bits a block), factors.
template <class Sizes>
struct Prepared {
    Sizes sizes;
    alignas(32) uint32_t signs[8];
    alignas(32) float factors[8];

    // words: of each block the signs and, in the four bits above them, n of its scale (2n + 1) * d.
    template <class Sink>
    DSV4_INLINE void set(const uint8_t* codes, u32x8 words, float d, int64_t k, Sink& sink) {
        sizes.set(codes);
        store_apart(signs, with_eighths(words));
        store_apart(factors, sink.scaled(k, to_float(bits<i32x8>(words >> 28 << 1 | 1)) * splat(d)));
    }
};

// Walks a row of `count` times eight blocks; prepare(s, to) makes them ready. From codes to sizes is a long way, which the
// processor goes for the next eight while it multiplies these.
template <class Sizes, class Sink, class Prepare>
DSV4_INLINE void visit_prepared(int64_t count, Sink& sink, Prepare&& prepare) {
    Prepared<Sizes> two[2];
    if (count > 0) prepare(0, two[0]);
    for (int64_t s = 0; s < count; ++s) {
        if (s + 1 < count) prepare(s + 1, two[(s + 1) & 1]);
        const Prepared<Sizes>& now = two[s & 1];
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) sink.put_signed(8 * s + j, now.sizes.of_block(j), now.signs[j], now.factors[j]);
    }
}

struct IQ2_XXSFormat {
    static constexpr bool HALVES = false, SPLIT = false, PREPARED = true;
    static constexpr int LOW = 0, ABOVE = 0, BYTES = 66, UNIT = 256, ROWS = 1;

    template <class Sink>
    static DSV4_INLINE void visit(const Row& row, int64_t cols, Sink& sink, const uint8_t* next) {
        visit_prepared<IQ2Sizes>(cols / 256, sink, [&](int64_t s, Prepared<IQ2Sizes>& to) {
            const uint8_t* b = row.data + BYTES * s;
            fetch<BYTES>(next + BYTES * s);
            to.set(b + 2, odd_lanes(b + 2), 0.125f * half_at(b), 8 * s, sink);
        });
    }
};

struct IQ3_XXSFormat {
    static constexpr bool HALVES = false, SPLIT = false, PREPARED = true;
    static constexpr int LOW = 0, ABOVE = 0, BYTES = 98, UNIT = 256, ROWS = 1;

    template <class Sink>
    static DSV4_INLINE void visit(const Row& row, int64_t cols, Sink& sink, const uint8_t* next) {
        visit_prepared<IQ3Sizes>(cols / 256, sink, [&](int64_t s, Prepared<IQ3Sizes>& to) {
            const uint8_t* b = row.data + BYTES * s;
            fetch<BYTES>(next + BYTES * s);
            to.set(b + 2, load<u32x8>(b + 66), 0.25f * half_at(b), 8 * s, sink);
        });
    }
};

}  // namespace dsv4
