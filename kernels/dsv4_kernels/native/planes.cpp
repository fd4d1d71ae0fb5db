// Products with IQ2_XXS where the processor looks 64 bytes up at once.
//
// A code of eight bits stands for a point of eight weights, a block of 32 weights is four points. Here a vector is not a block
// but a plane: one weight of each of 32 points, that is of eight blocks, so that four bytes in a row are of one block. Summed as
// whole numbers over the eight planes, lane i of a product is block i, and scales are met once for eight blocks instead of eight
// times. Looking up gives planes by themselves: two bits for the size of each weight, in two bytes a point, from which sizes
// with their signs follow by a second look. Two rows share a register of 64 bytes.
//
// Activations lie in the order of planes. Weights are kept as 128 more than they are, since one side of a product of bytes has
// no sign; `offsets` make up for that.
#include "planes.h"

#if DSV4_LOOKS_UP_MANY

#include <algorithm>

#include "formats.h"
#include "lanes.h"

namespace dsv4 {
namespace {

typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef float f32x16 __attribute__((vector_size(64)));

constexpr int64_t BYTES = 66, UNIT = 256, COUNT = 8;  // of a row: bytes that are so many weights, in so many planes
constexpr int PAIR = 2;                               // rows in a register

struct Tables {
    alignas(64) uint8_t signs[128];         // of seven bits: eight, of which an even number is set
    alignas(64) uint8_t even[64], odd[64];  // weights: sizes of bits 0-1 and sign of bit 4; of bits 2-3 and bit 5
    alignas(64) float scales[16];
};

Tables tables;

DSV4_INLINE u8x64 look_up(u8x64 table, u8x64 index) { return u8x64(_mm512_permutexvar_epi8(__m512i(index), __m512i(table))); }

DSV4_INLINE u8x64 look_up_128(const uint8_t* table, u8x64 index) {
    return u8x64(_mm512_permutex2var_epi8(load<__m512i>(table), __m512i(index), load<__m512i>(table + 64)));
}

// `from` where a bit of 0x30 is set, else `other`.
DSV4_INLINE u8x64 with_signs(u8x64 from, u8x64 other) {
    return u8x64(_mm512_ternarylogic_epi64(_mm512_set1_epi8(0x30), __m512i(from), __m512i(other), 0xca));
}

DSV4_INLINE u8x64 up(u8x64 v, int count) { return bits<u8x64>(bits<u16x32>(v) << count); }
DSV4_INLINE u8x64 down(u8x64 v, int count) { return bits<u8x64>(bits<u16x32>(v) >> count); }

// Eight blocks of two rows, looked up once.
struct Eight {
    u8x64 low, high;  // of each point: sizes of its weights 0 to 3 and 4 to 7, two bits each
    u8x64 signs;      // of its weights, a bit each
    f32x16 scales;    // of each block

    // A block is four codes and a word: four times seven bits of sign, and four of the scale.
    DSV4_INLINE Eight(const uint8_t* first, const uint8_t* second) {
        constexpr i32x16 EVEN = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
        const __m512i SEVENS = _mm512_set1_epi64(0x352e2720150e0700), HALVES = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        __m512i a = load<__m512i>(first + 2), b = load<__m512i>(second + 2);
        __m512i codes = _mm512_permutex2var_epi32(a, __m512i(EVEN), b);
        u32x16 words = u32x16(_mm512_permutex2var_epi32(a, __m512i(EVEN + 1), b));
        __mmask64 upper = _mm512_movepi8_mask(codes);
        low = u8x64(look_up_64(iq2_xxs_grid.codes.low, codes, upper));
        high = u8x64(look_up_64(iq2_xxs_grid.codes.high, codes, upper));
        signs = look_up_128(tables.signs, u8x64(_mm512_multishift_epi64_epi8(SEVENS, __m512i(words))));
        __m128i d = _mm_insert_epi16(_mm_cvtsi32_si128(load<uint16_t>(first)), load<uint16_t>(second), 1);
        f32x16 each = f32x16(_mm512_permutexvar_ps(HALVES, _mm512_castps128_ps512(_mm_cvtph_ps(d))));
        scales = f32x16(_mm512_permutexvar_ps(__m512i(words >> 28), load<__m512>(tables.scales))) * each;
    }

    // body(p, bytes) for the planes in turn, those of the first row in the lower half.
    template <class Body>
    DSV4_INLINE void planes(Body&& body) const {
        u8x64 even = load<u8x64>(tables.even), odd = load<u8x64>(tables.odd);
        auto both = [&](int p, u8x64 index) {
            body(p, look_up(even, index));
            body(p + 1, look_up(odd, index));
        };
        both(0, with_signs(up(signs, 4), low));
        both(2, with_signs(up(signs, 2), down(low, 4)));
        both(4, with_signs(signs, high));
        both(6, with_signs(down(signs, 2), down(high, 4)));
    }
};

template <class Half, class V>
DSV4_INLINE Half half(V v, int which) {
    return Half(which ? _mm512_extracti64x4_epi64(__m512i(v), 1) : _mm512_castsi512_si256(__m512i(v)));
}

template <class V>
DSV4_INLINE V twice_of(const void* from) {
    return V(_mm512_broadcast_i64x4(load<__m256i>(from)));
}

DSV4_INLINE i32x16 dot_unsigned(u8x64 w, u8x64 a, i32x16 onto) {
    return i32x16(_mm512_dpbusd_epi32(__m512i(onto), __m512i(w), __m512i(a)));
}

// Two rows with one token.
DSV4_INLINE void dots(const uint8_t* first, const uint8_t* second, int64_t units, const Lanes& a, const uint8_t* next, float* y) {
    f32x16 total = {};
    Eight ahead(first, second);
    for (int64_t s = 0; s < units; ++s) {
        // Looking up is a long way, which the processor goes for the next eight blocks while it multiplies these.
        Eight now = ahead;
        int64_t after = BYTES * std::min(s + 1, units - 1);
        fetch<PAIR * BYTES>(next + PAIR * BYTES * s);
        ahead = Eight(first + after, second + after);
        i32x16 sums[2] = {twice_of<i32x16>(a.offsets + COUNT * s)};
        now.planes([&](int p, u8x64 w) {
            sums[p & 1] = dot_unsigned(w, twice_of<u8x64>(a.q + UNIT * s + 32 * p), sums[p & 1]);
        });
        f32x16 factors = now.scales * twice_of<f32x16>(a.d + COUNT * s);
        total = f32x16(_mm512_fmadd_ps(_mm512_cvtepi32_ps(__m512i(sums[0] + sums[1])), __m512(factors), __m512(total)));
    }
    for (int r = 0; r < PAIR; ++r) y[r] = sum(half<f32x8>(total, r));
}

using PlanesTile = Tile<false, 0, 128, false>;

// Rows first and second become rows r and r + 1 of the tile.
DSV4_INLINE void unpack(const PlanesTile& tile, const uint8_t* first, const uint8_t* second, int64_t units, int r, const uint8_t* next) {
    for (int64_t s = 0; s < units; ++s) {
        Eight eight(first + BYTES * s, second + BYTES * s);
        fetch<PAIR * BYTES>(next + PAIR * BYTES * s);
        eight.planes([&](int p, u8x64 bytes) { store(tile.vector_of(s, p, r), bytes); });
        store(tile.scales_of(s, 0, r), eight.scales);
    }
}

}  // namespace

void set_planes() {
    for (int i = 0; i < 128; ++i) tables.signs[i] = uint8_t(i | (__builtin_popcount(unsigned(i)) & 1) << 7);
    for (int i = 0; i < 64; ++i) {
        int even = iq2_xxs_grid.sizes[i & 3], odd = iq2_xxs_grid.sizes[i >> 2 & 3];
        tables.even[i] = uint8_t(128 + (i & 16 ? -even : even));
        tables.odd[i] = uint8_t(128 + (i & 32 ? -odd : odd));
    }
    for (int i = 0; i < 16; ++i) tables.scales[i] = 0.125f * float(2 * i + 1);
}

void multiply_planes(const Weight& weight, int64_t begin, int64_t end, const Activations& x, const Picked& picked, float* y,
                     int64_t y_stride) {
    auto row = [&](int64_t i) { return weight.data + std::min(i, end - 1) * weight.row_bytes; };  // an odd one meets itself
    int64_t units = weight.cols / UNIT;
    if (picked.count <= FEW) {
        for (int64_t r = begin; r < end; r += PAIR)
            for (int64_t i = 0; i < picked.count; ++i) {
                float found[PAIR];
                dots(row(r), row(r + 1), units, Lanes(x, picked[i], 0), behind(weight, r, PAIR), found);
                std::copy_n(found, std::min<int64_t>(PAIR, end - r), y + i * y_stride + r - begin);
            }
        return;
    }
    PlanesTile tile(weight.cols);
    for (int64_t first = begin; first < end; first += TILE) {
        for (int r = 0; r < TILE; r += PAIR)
            unpack(tile, row(first + r), row(first + r + 1), units, r, behind(weight, first + r, PAIR));
        meet_all(tile, int(std::min<int64_t>(TILE, end - first)), x, picked, y + first - begin, y_stride);
    }
}

}  // namespace dsv4

#endif
