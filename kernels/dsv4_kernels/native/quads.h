// Q2_K with one token, where registers have 64 bytes: those that are 256 weights are one register, in whose every byte two bits
// are a weight of block j and, in the upper half, of block 4 + j, for j from 0 to 3.
//
// Sums of four products fit into 16 bits, so those of two j share a register when they meet the scales of their halves, which
// are small whole numbers. But for the last, weights are met where they lie, 4^j too great; the factors of activations make up
// for that, and being powers of two round nothing.
#pragma once

#include "formats.h"

#if DSV4_64_BYTES

namespace dsv4 {

// What a token brings to 256 weights of every row.
struct ForQuads {
    __m512i q[4];       // of blocks j and 4 + j
    __m512 factors[2];  // for products of j = 0, 1 and of j = 2, 3: a pair of lanes each in every sixteen bytes
    __m512 sums;

    DSV4_INLINE ForQuads(const int8_t* from, const float* d, const float* from_sums) {
        const __m512i PAIRS = _mm512_set_epi32(5, 5, 4, 4, 5, 5, 4, 4, 1, 1, 0, 0, 1, 1, 0, 0);
        auto powers = [](float first, float second) {
            return _mm512_broadcast_f32x4(_mm_set_ps(second, second, first, first));
        };
        for (int j = 0; j < 4; ++j)
            q[j] = _mm512_inserti64x4(_mm512_castsi256_si512(load<__m256i>(from + 32 * j)), load<__m256i>(from + 128 + 32 * j), 1);
        __m512 of_blocks = _mm512_castps256_ps512(load<__m256>(d));
        factors[0] = _mm512_permutexvar_ps(PAIRS, of_blocks) * powers(1, 0x1p-2f);
        factors[1] = _mm512_permutexvar_ps(_mm512_add_epi32(PAIRS, _mm512_set1_epi32(2)), of_blocks) * powers(0x1p-4f, 1);
        sums = load<__m512>(from_sums) * _mm512_set1_ps(0x1p-4f);  // minima lie in upper nibbles
    }
};

// The 256 weights at b, their minima off, times those of a token; added to `total`.
DSV4_INLINE __m512 add_quads(const uint8_t* b, const ForQuads& a, __m512 total) {
    // Of each half of a block, in fours: the byte that is its scale, made 16 bits.
    constexpr int64_t ONE = 0x0001000100010001, NOTHING = int64_t(0x8000800080008000);
    const __m512i PLACES = _mm512_set_epi64(NOTHING + 11 * ONE, NOTHING + 9 * ONE, NOTHING + 10 * ONE, NOTHING + 8 * ONE,
                                            NOTHING + 3 * ONE, NOTHING + ONE, NOTHING + 2 * ONE, NOTHING);
    alignas(16) float d[4];
    store_apart(d, f32x4(_mm_cvtph_ps(_mm_cvtsi32_si128(load<int32_t>(b + 80)))));
    __m128i bytes = load<__m128i>(b);
    __m512i scales = _mm512_broadcast_i32x4(bytes) & _mm512_set1_epi8(15);
    __m512i quads = kept(load<__m512i>(b + 16));
    auto products = [&](__m512i w, int j) { return _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, a.q[j]); };
    auto of_two = [&](__m512i first, __m512i second, int j) {
        __m512i steps = _mm512_shuffle_epi8(scales, _mm512_add_epi16(PLACES, _mm512_set1_epi16(short(2 * j))));
        return _mm512_cvtepi32_ps(_mm512_madd_epi16(_mm512_packs_epi32(products(first, j), products(second, j + 1)), steps));
    };
    __m512i upper = _mm512_srli_epi16(quads, 6);
    __m512 sum = of_two(quads & _mm512_set1_epi8(3), quads & _mm512_set1_epi8(12), 0) * a.factors[0];
    sum = _mm512_fmadd_ps(of_two(quads & _mm512_set1_epi8(48), upper & _mm512_set1_epi8(3), 2), a.factors[1], sum);
    __m512 lows = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes) & _mm512_set1_epi32(240));
    total = _mm512_fnmadd_ps(lows * a.sums, _mm512_set1_ps(d[1]), total);
    return _mm512_fmadd_ps(sum, _mm512_set1_ps(d[0]), total);
}

template <int ROWS>
DSV4_INLINE void dots_of_quads(const Row (&rows)[ROWS], int64_t cols, const int8_t* q, const float* d, const float* sums,
                               const uint8_t* next, float* y) {
    constexpr int64_t BYTES = Q2_KFormat::BYTES, UNIT = Q2_KFormat::UNIT;
    __m512 totals[ROWS] = {};
    for (int64_t s = 0; s < cols / UNIT; ++s) {
        fetch<ROWS * BYTES>(next + ROWS * BYTES * s);
        ForQuads a(q + UNIT * s, d + 8 * s, sums + 16 * s);
        for (int r = 0; r < ROWS; ++r) totals[r] = add_quads(rows[r].data + BYTES * s, a, totals[r]);
    }
    for (int r = 0; r < ROWS; ++r)
        y[r] = sum(f32x8(_mm512_castps512_ps256(totals[r])) + f32x8(_mm512_extractf32x8_ps(totals[r], 1)));
}

}  // namespace dsv4

#endif
