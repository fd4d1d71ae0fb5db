// How each block format unpacks: `visit` walks a row and tells a sink, 32 weights at a time, their bytes and their scale.
//
// A sink has four verbs, and wants even and odd k in turn, so that the compiler can tell them apart. put(k, w, scale): block k is scale * w with signed bytes w. put_unsigned: the same with bytes 0..63.
// put_signed: magnitudes and a bit where the sign is minus. low(i, m): weights of group i of eight sub-blocks lie m
// below that. A scale is one float, or (HALVES) a vector whose low lanes hold for the first 16 weights.
//
// Layouts are those of GGUF and of the official checkpoints; see the decoders in dsv4_quant.formats.
#pragma once

#include "simd.h"
#include "weight.h"

namespace dsv4 {

extern uint64_t grid_iq2_xxs[256];  // eight magnitudes each
extern uint32_t grid_iq3_xxs[256];  // four magnitudes each

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

struct Q8_0Format {
    static constexpr bool HALVES = false, SPLIT = false;
    static constexpr int LOW = 0;

    template <class Sink>
    static DSV4_INLINE void visit(const Row& row, int64_t cols, Sink& sink) {
        in_pairs(cols / 32, [&](int64_t k) {
            const uint8_t* b = row.data + 34 * k;
            sink.put(k, load<i8x32>(b + 2), half_at(b));
        });
    }
};

// Codes 0 .5 1 1.5 2 3 4 6 and their negatives, doubled to be whole; the scale is halved instead.
constexpr i8x16 E2M1 = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct MXFP4Format {
    static constexpr bool HALVES = false, SPLIT = false;
    static constexpr int LOW = 0;

    template <class Sink>
    static DSV4_INLINE void visit(const Row& row, int64_t cols, Sink& sink) {
        in_pairs(cols / 32, [&](int64_t k) {
            const uint8_t* b = row.data + 17 * k;
            sink.put(k, look_up(E2M1, nibbles(b + 1)), HALF_E8M0.of[*b]);
        });
    }
};

struct FP4Format {
    static constexpr bool HALVES = false, SPLIT = true;  // a byte holds neighbours: its nibbles are evens and odds
    static constexpr int LOW = 0;

    template <class Sink>
    static DSV4_INLINE void visit(const Row& row, int64_t cols, Sink& sink) {
        in_pairs(cols / 32, [&](int64_t k) {
            float scale = row.float_scales ? 0.5f * load<float>(row.scales + 4 * k) : HALF_E8M0.of[row.scales[k]];
            sink.put(k, look_up(E2M1, nibbles(row.data + 16 * k)), scale);
        });
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
    static constexpr bool HALVES = false, SPLIT = false;
    static constexpr int LOW = 32;

    template <class Sink>
    static DSV4_INLINE void visit(const Row& row, int64_t cols, Sink& sink) {
        const uint8_t* b = row.data;
        for (int64_t s = 0; s < cols / 256; ++s, b += 144) {
            SixBits six(b + 4);
            float scales[8];
            store(scales, bytes_to_floats(six.scales) * splat(half_at(b)));
            sink.low(s, bytes_to_floats(six.lows) * splat(half_at(b + 2)));
            for (int j = 0; j < 4; ++j) {
                u8x32 pairs = load<u8x32>(b + 16 + 32 * j);
                sink.put_unsigned(8 * s + 2 * j, field<0>(pairs, 15), scales[2 * j]);
                sink.put_unsigned(8 * s + 2 * j + 1, field<4>(pairs, 15), scales[2 * j + 1]);
            }
        }
    }
};

struct Q5_KFormat {
    static constexpr bool HALVES = false, SPLIT = false;
    static constexpr int LOW = 32;

    template <class Sink>
    static DSV4_INLINE void visit(const Row& row, int64_t cols, Sink& sink) {
        const uint8_t* b = row.data;
        for (int64_t s = 0; s < cols / 256; ++s, b += 176) {
            SixBits six(b + 4);
            float scales[8];
            store(scales, bytes_to_floats(six.scales) * splat(half_at(b)));
            sink.low(s, bytes_to_floats(six.lows) * splat(half_at(b + 2)));
            u8x32 fifth = load<u8x32>(b + 16);
            for (int j = 0; j < 4; ++j) {
                u8x32 pairs = load<u8x32>(b + 48 + 32 * j);
                u8x32 low = field<0>(pairs, 15) | bits<u8x32>(bits<u32x8>(field<0>(fifth, 1)) << 4);
                u8x32 high = field<4>(pairs, 15) | bits<u8x32>(bits<u32x8>(field<1>(fifth, 1)) << 4);
                sink.put_unsigned(8 * s + 2 * j, low, scales[2 * j]);
                sink.put_unsigned(8 * s + 2 * j + 1, high, scales[2 * j + 1]);
                fifth = bits<u8x32>(bits<u32x8>(fifth) >> 2);  // what crosses into a neighbour is masked away above
            }
        }
    }
};

struct Q6_KFormat {
    static constexpr bool HALVES = true, SPLIT = false;
    static constexpr int LOW = 0;

    template <class Sink>
    static DSV4_INLINE void visit(const Row& row, int64_t cols, Sink& sink) {
        const uint8_t* b = row.data;
        for (int64_t s = 0; s < cols / 256; ++s, b += 210) {
            f32x8 d = splat(half_at(b + 208));
            float steps[16];
            store(steps, signed_bytes_to_floats(b + 192) * d);
            store(steps + 8, signed_bytes_to_floats(b + 200) * d);
            for (int half = 0; half < 2; ++half) {
                u8x32 first = load<u8x32>(b + 64 * half), second = load<u8x32>(b + 64 * half + 32);
                u8x32 upper = load<u8x32>(b + 128 + 32 * half);
                u8x32 codes[4] = {field<0>(first, 15) | bits<u8x32>(bits<u32x8>(field<0>(upper, 3)) << 4),
                                  field<0>(second, 15) | bits<u8x32>(bits<u32x8>(field<2>(upper, 3)) << 4),
                                  field<4>(first, 15) | bits<u8x32>(bits<u32x8>(field<4>(upper, 3)) << 4),
                                  field<4>(second, 15) | bits<u8x32>(bits<u32x8>(field<6>(upper, 3)) << 4)};
                for (int j = 0; j < 4; ++j) {
                    const float* step = steps + 8 * half + 2 * j;
                    sink.put(8 * s + 4 * half + j, i8x32(codes[j]) - 32, splat(step[0], step[1]));
                }
            }
        }
    }
};

struct Q3_KFormat {
    static constexpr bool HALVES = true, SPLIT = false;
    static constexpr int LOW = 0;

    template <class Sink>
    static DSV4_INLINE void visit(const Row& row, int64_t cols, Sink& sink) {
        const uint8_t* b = row.data;
        for (int64_t s = 0; s < cols / 256; ++s, b += 110) {
            f32x8 d = splat(half_at(b + 108));
            float steps[16];
            scales(b + 96, d, steps);
            u8x32 third = ~load<u8x32>(b);  // a bit that is clear takes 4 away
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                u8x32 pairs = load<u8x32>(b + 32 + 32 * (j / 4));
                u8x32 code = bits<u8x32>(bits<u32x8>(pairs) >> (2 * (j % 4))) & 3;
                u8x32 below = bits<u8x32>(bits<u32x8>(third) >> j) & 1;
                i8x32 w = i8x32(code) - i8x32(bits<u8x32>(bits<u32x8>(below) << 2));
                sink.put(8 * s + j, w, splat(steps[2 * j], steps[2 * j + 1]));
            }
        }
    }

    // Sixteen scales of six bits, less 32: low nibbles in eight bytes, the upper two bits in the last four.
    static DSV4_INLINE void scales(const uint8_t* from, f32x8 d, float* steps) {
        uint32_t a = load<uint32_t>(from), b = load<uint32_t>(from + 4), upper = load<uint32_t>(from + 8);
        auto both = [](uint32_t low, uint32_t high) { return low | uint64_t(high) << 32; };
        uint64_t first = both((a & 0x0f0f0f0fu) | (upper << 4 & 0x30303030u), (b & 0x0f0f0f0fu) | (upper << 2 & 0x30303030u));
        uint64_t second = both((a >> 4 & 0x0f0f0f0fu) | (upper & 0x30303030u), (b >> 4 & 0x0f0f0f0fu) | (upper >> 2 & 0x30303030u));
        store(steps, (bytes_to_floats(first) - 32.0f) * d);
        store(steps + 8, (bytes_to_floats(second) - 32.0f) * d);
    }
};

struct Q2_KFormat {
    static constexpr bool HALVES = true, SPLIT = false;
    static constexpr int LOW = 16;

    template <class Sink>
    static DSV4_INLINE void visit(const Row& row, int64_t cols, Sink& sink) {
        const uint8_t* b = row.data;
        for (int64_t s = 0; s < cols / 256; ++s, b += 84) {
            uint64_t first = load<uint64_t>(b), second = load<uint64_t>(b + 8);
            constexpr uint64_t LOW_NIBBLES = 0x0f0f0f0f0f0f0f0fu;
            f32x8 d = splat(half_at(b + 80)), d_low = splat(half_at(b + 82));
            float steps[16];
            store(steps, bytes_to_floats(first & LOW_NIBBLES) * d);
            store(steps + 8, bytes_to_floats(second & LOW_NIBBLES) * d);
            sink.low(2 * s, bytes_to_floats(first >> 4 & LOW_NIBBLES) * d_low);
            sink.low(2 * s + 1, bytes_to_floats(second >> 4 & LOW_NIBBLES) * d_low);
            for (int half = 0; half < 2; ++half) {
                u8x32 quads = load<u8x32>(b + 16 + 32 * half);
                u8x32 codes[4] = {field<0>(quads, 3), field<2>(quads, 3), field<4>(quads, 3), field<6>(quads, 3)};
                for (int j = 0; j < 4; ++j) {
                    const float* step = steps + 8 * half + 2 * j;
                    sink.put_unsigned(8 * s + 4 * half + j, codes[j], splat(step[0], step[1]));
                }
            }
        }
    }
};

// Signs of 32 weights: of each eight, seven bits, and an eighth that makes their number even.
DSV4_INLINE uint32_t with_parity(uint32_t signs) {
    uint32_t sevens = spread_sevens(signs), odd = sevens ^ sevens >> 4;
    odd ^= odd >> 2;
    odd ^= odd >> 1;
    return sevens | (odd & 0x01010101u) << 7;
}

struct IQ2_XXSFormat {
    static constexpr bool HALVES = false, SPLIT = false;
    static constexpr int LOW = 0;

    template <class Sink>
    static DSV4_INLINE void visit(const Row& row, int64_t cols, Sink& sink) {
        const uint8_t* b = row.data;
        for (int64_t s = 0; s < cols / 256; ++s, b += 66) {
            float d = 0.125f * half_at(b);
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                const uint8_t* p = b + 2 + 8 * j;
                uint32_t signs = load<uint32_t>(p + 4);
                u64x4 sizes = {grid_iq2_xxs[p[0]], grid_iq2_xxs[p[1]], grid_iq2_xxs[p[2]], grid_iq2_xxs[p[3]]};
                sink.put_signed(8 * s + j, bits<u8x32>(sizes), with_parity(signs), d * ODD[signs >> 28]);
            }
        }
    }
};

struct IQ3_XXSFormat {
    static constexpr bool HALVES = false, SPLIT = false;
    static constexpr int LOW = 0;

    template <class Sink>
    static DSV4_INLINE void visit(const Row& row, int64_t cols, Sink& sink) {
        const uint8_t* b = row.data;
        for (int64_t s = 0; s < cols / 256; ++s, b += 98) {
            float d = 0.25f * half_at(b);
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                const uint8_t* p = b + 2 + 8 * j;
                uint32_t signs = load<uint32_t>(b + 66 + 4 * j);
                u32x8 sizes = {grid_iq3_xxs[p[0]], grid_iq3_xxs[p[1]], grid_iq3_xxs[p[2]], grid_iq3_xxs[p[3]],
                               grid_iq3_xxs[p[4]], grid_iq3_xxs[p[5]], grid_iq3_xxs[p[6]], grid_iq3_xxs[p[7]]};
                sink.put_signed(8 * s + j, bits<u8x32>(sizes), with_parity(signs), d * ODD[signs >> 28]);
            }
        }
    }
};

}  // namespace dsv4
