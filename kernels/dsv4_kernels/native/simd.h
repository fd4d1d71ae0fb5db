// Vectors of 32 bytes. Arithmetic on them is the compiler's own, on every machine; only what no operator can say (byte
// dot products, table look-ups, rounding, half floats) is spelled per instruction set: AVX2, with VNNI where there is AVX-512
// or AVX-VNNI, NEON, and plain C++ (always with DSV4_PORTABLE).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(DSV4_PORTABLE) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define DSV4_AVX2 1
#include <immintrin.h>
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
#define DSV4_VNNI 1
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define DSV4_64_BYTES 1
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#define DSV4_BF16 1
#endif
#elif !defined(DSV4_PORTABLE) && defined(__ARM_NEON) && defined(__aarch64__)
#define DSV4_NEON 1
#include <arm_neon.h>
#endif

#define DSV4_INLINE inline __attribute__((always_inline))

namespace dsv4 {

typedef int8_t i8x32 __attribute__((vector_size(32)));
typedef uint8_t u8x32 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int16_t i16x32 __attribute__((vector_size(64)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));
typedef int8_t i8x8 __attribute__((vector_size(8)));
typedef uint64_t u64x4 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));

template <class V>
DSV4_INLINE V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
DSV4_INLINE void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

DSV4_INLINE f32x8 splat(float x) { return f32x8{x, x, x, x, x, x, x, x}; }

// Two lanes of eight, each four times: those of half j.
DSV4_INLINE f32x8 halves_of(f32x8 v, int j) {
#if DSV4_AVX2
    return f32x8(_mm256_permutevar8x32_ps(__m256(v), _mm256_set_m128i(_mm_set1_epi32(2 * j + 1), _mm_set1_epi32(2 * j))));
#else
    float low = v[2 * j], high = v[2 * j + 1];
    return f32x8{low, low, low, low, high, high, high, high};
#endif
}

// Lane j of eight, eight times.
DSV4_INLINE f32x8 lane(f32x8 v, int j) {
#if DSV4_AVX2
    return f32x8(_mm256_permutevar8x32_ps(__m256(v), _mm256_set1_epi32(j)));
#else
    return splat(v[j]);
#endif
}

// Four numbers, each twice.
DSV4_INLINE f32x8 twice(const float* from) {
#if DSV4_AVX2
    const __m256i places = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
    return f32x8(_mm256_permutevar8x32_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(from)), places));
#else
    return f32x8{from[0], from[0], from[1], from[1], from[2], from[2], from[3], from[3]};
#endif
}

// Stores v where it will be read one by one. The compiler may not see through it: it would take lanes out of a register, at two
// or three instructions each, where a number from memory comes spread for nothing.
template <class T, class V>
DSV4_INLINE void store_apart(T* to, V v) {
    store(to, v);
    __asm__ volatile("" : "+m"(*reinterpret_cast<V*>(to)));
}

// Keeps v in a register: the compiler likes to load it again for each of its uses, of which there are more than loads to spare.
template <class V>
DSV4_INLINE V kept(V v) {
#if defined(__AVX512VL__) && DSV4_AVX2
    __asm__("" : "+v"(v));
#elif DSV4_AVX2
    __asm__("" : "+x"(v));
#endif
    return v;
}

template <class To, class From>
DSV4_INLINE To bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &v, sizeof to);
    return to;
}

// ---- Floats ----

DSV4_INLINE f32x8 fma(f32x8 a, f32x8 b, f32x8 c) {
#if DSV4_AVX2
    return f32x8(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
    return a * b + c;
#endif
}

#if DSV4_BF16
// a . b of two bf16 numbers in each lane, added to `onto`.
DSV4_INLINE f32x8 dot_pairs(u32x8 a, u32x8 b, f32x8 onto) {
    return f32x8(_mm256_dpbf16_ps(__m256(onto), __m256bh(a), __m256bh(b)));
}
#endif

DSV4_INLINE float sum(f32x8 v) {
    f32x4 four = f32x4{v[0], v[1], v[2], v[3]} + f32x4{v[4], v[5], v[6], v[7]};
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// The sums of four vectors, as `sum` adds; together they take half the instructions.
DSV4_INLINE f32x4 sums(const f32x8 (&v)[4]) {
    auto halves = [](f32x8 x) { return f32x4{x[0], x[1], x[2], x[3]} + f32x4{x[4], x[5], x[6], x[7]}; };
    auto pairs = [](f32x4 a, f32x4 b) { return f32x4{a[0], a[1], b[0], b[1]} + f32x4{a[2], a[3], b[2], b[3]}; };
    f32x4 first = pairs(halves(v[0]), halves(v[1])), second = pairs(halves(v[2]), halves(v[3]));
    return f32x4{first[0], first[2], second[0], second[2]} + f32x4{first[1], first[3], second[1], second[3]};
}

DSV4_INLINE f32x8 to_float(i32x8 v) { return __builtin_convertvector(v, f32x8); }

DSV4_INLINE float half_to_float(uint16_t h) {
#if DSV4_AVX2
    return _cvtsh_ss(h);
#elif DSV4_NEON
    __fp16 x;
    std::memcpy(&x, &h, 2);
    return x;
#else
    // The exponent is moved into place by a product, which also makes subnormals right; infinities keep theirs.
    uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = uint32_t(h & 0x7fff) << 13;
    float x = bits<float>(magnitude) * 0x1p112f;
    if ((h & 0x7c00) == 0x7c00) x = bits<float>(magnitude | 0x7f800000u);
    return bits<float>(bits<uint32_t>(x) | sign);
#endif
}

DSV4_INLINE float half_at(const uint8_t* from) { return half_to_float(load<uint16_t>(from)); }

DSV4_INLINE f32x8 halves_at(const void* from) {
#if DSV4_AVX2
    return f32x8(_mm256_cvtph_ps(load<__m128i>(from)));
#else
    f32x8 v;
    for (int i = 0; i < 8; ++i) v[i] = half_at(static_cast<const uint8_t*>(from) + 2 * i);
    return v;
#endif
}

// Widening eight numbers is one instruction, which compilers do not find by themselves.
DSV4_INLINE i32x8 widen_unsigned(u8x8 v) {
#if DSV4_AVX2
    return i32x8(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&v))));
#else
    return __builtin_convertvector(v, i32x8);
#endif
}

DSV4_INLINE i32x8 widen_signed(i8x8 v) {
#if DSV4_AVX2
    return i32x8(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&v))));
#else
    return __builtin_convertvector(v, i32x8);
#endif
}

DSV4_INLINE f32x8 bf16_at(const void* from) {
#if DSV4_AVX2
    return f32x8(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16)));
#else
    return bits<f32x8>(__builtin_convertvector(load<u16x8>(from), u32x8) << 16);
#endif
}

// E4M3 without its NaN codes: sign and seven bits moved into a float's places; the product mends the exponent's bias.
DSV4_INLINE f32x8 e4m3_at(const void* from) {
    i32x8 code = widen_signed(load<i8x8>(from));
    return bits<f32x8>((code << 20) & int32_t(0x87f00000u)) * splat(0x1p120f);  // the sign was spread to all bits above it
}

// 2^(e - 127) of E8M0 (255 means NaN), or half of it, without a conversion.
struct Powers {
    float of[256];

    constexpr explicit Powers(float power) : of() {  // the first is no normal float
        for (int e = 0; e < 255; ++e) {
            of[e] = power;
            if (e < 254) power *= 2;
        }
        of[255] = __builtin_nanf("");
    }
};

inline constexpr Powers E8M0(0x1p-127f), HALF_E8M0(0x1p-128f);

DSV4_INLINE float e8m0(uint8_t exponent) { return E8M0.of[exponent]; }

// e^x to about one unit in the last place, 0 below -87; the usual 2^n times a polynomial of the remainder.
DSV4_INLINE f32x8 exp(f32x8 x) {
    f32x8 low = splat(-87.3f), high = splat(88.3f);
    auto tiny = x < low;
    x = tiny ? low : x;
    x = x > high ? high : x;
    f32x8 scaled = x * splat(1.44269504f) + splat(12582912.0f);  // rounds to the nearest whole number
    f32x8 n = scaled - splat(12582912.0f);
    f32x8 r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    f32x8 p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    i32x8 power = (__builtin_convertvector(n, i32x8) + 127) << 23;
    f32x8 result = p * bits<f32x8>(power);
    return tiny ? splat(0.0f) : result;
}

// ---- Bytes ----

constexpr uint64_t SPREAD = 0x0101010101010101u;  // times a byte: eight of it

#if DSV4_VNNI
constexpr bool ANY_BYTES = true;  // dot_unsigned takes every w
#else
constexpr bool ANY_BYTES = false;
#endif
#if DSV4_64_BYTES
constexpr bool IN_64_BYTES = true;  // registers of 64 bytes and sums of such products
#else
constexpr bool IN_64_BYTES = false;
#endif
#if (defined(__AVX512VL__) && DSV4_AVX2) || DSV4_NEON
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

// Products summed in fours: to lane i of `onto` comes w[4i..4i+3] . a[4i..4i+3]. No w is above 127 unless ANY_BYTES, no a is -128.
DSV4_INLINE i32x8 dot_unsigned(u8x32 w, i8x32 a, i32x8 onto = i32x8{}) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && DSV4_AVX2
    return i32x8(_mm256_dpbusd_epi32(__m256i(onto), __m256i(w), __m256i(a)));
#elif DSV4_VNNI
    return i32x8(_mm256_dpbusd_avx_epi32(__m256i(onto), __m256i(w), __m256i(a)));
#elif DSV4_AVX2
    return onto + i32x8(_mm256_madd_epi16(_mm256_maddubs_epi16(__m256i(w), __m256i(a)), _mm256_set1_epi16(1)));
#elif DSV4_NEON
    int8x16_t w0 = load<int8x16_t>(&w), w1 = load<int8x16_t>(reinterpret_cast<const char*>(&w) + 16);
    int8x16_t a0 = load<int8x16_t>(&a), a1 = load<int8x16_t>(reinterpret_cast<const char*>(&a) + 16);
#if defined(__ARM_FEATURE_DOTPROD)
    int32x4_t parts[2] = {vdotq_s32(vdupq_n_s32(0), w0, a0), vdotq_s32(vdupq_n_s32(0), w1, a1)};
#else
    auto fours = [](int8x16_t x, int8x16_t y) {
        int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(y)), high = vmull_s8(vget_high_s8(x), vget_high_s8(y));
        return vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
    };
    int32x4_t parts[2] = {fours(w0, a0), fours(w1, a1)};
#endif
    return onto + load<i32x8>(parts);
#else
    i16x32 products = __builtin_convertvector(i8x32(w), i16x32) * __builtin_convertvector(a, i16x32);
    i32x8 sums = onto;
    for (int i = 0; i < 8; ++i)
        sums[i] += products[4 * i] + products[4 * i + 1] + products[4 * i + 2] + products[4 * i + 3];
    return sums;
#endif
}

// The same for signed w above -128. Only x86 has no instruction for it: the sign goes over to a.
DSV4_INLINE i32x8 dot(i8x32 w, i8x32 a) {
#if DSV4_AVX2
    return dot_unsigned(u8x32(_mm256_abs_epi8(__m256i(w))), i8x32(_mm256_sign_epi8(__m256i(a), __m256i(w))));
#else
    return dot_unsigned(u8x32(w), a);  // NEON and plain C++ take bytes as signed anyway
#endif
}

// The same where the magnitudes of w are at hand.
DSV4_INLINE i32x8 dot(u8x32 size, i8x32 w, i8x32 a) {
#if DSV4_AVX2
    return dot_unsigned(size, i8x32(_mm256_sign_epi8(__m256i(a), __m256i(w))));
#else
    (void)size;
    return dot(w, a);
#endif
}

DSV4_INLINE u8x32 magnitudes(i8x32 w) {
#if DSV4_AVX2
    return u8x32(_mm256_abs_epi8(__m256i(w)));
#else
    return u8x32(w < 0 ? -w : w);
#endif
}

// a with the signs of those bytes turned whose bit is set.
DSV4_INLINE i8x32 negate(i8x32 a, uint32_t which) {
#if DSV4_AVX2 && defined(__AVX512BW__) && defined(__AVX512VL__)
    return i8x32(_mm256_mask_sub_epi8(__m256i(a), which, _mm256_setzero_si256(), __m256i(a)));
#else
    constexpr u8x32 BIT = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128,
                           1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
#if DSV4_AVX2
    const __m256i BYTE = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    u8x32 bytes = u8x32(_mm256_shuffle_epi8(_mm256_set1_epi32(int(which)), BYTE));
#else
    u8x32 bytes = bits<u8x32>(u64x4{(which & 255) * SPREAD, (which >> 8 & 255) * SPREAD, (which >> 16 & 255) * SPREAD,
                                    (which >> 24) * SPREAD});
#endif
    i8x32 mask = i8x32((bytes & BIT) == BIT);
    return (a ^ mask) - mask;
#endif
}

// The second, fourth, ... of sixteen numbers in a row.
DSV4_INLINE u32x8 odd_lanes(const uint8_t* from) {
#if DSV4_AVX2
    __m256 picked = _mm256_shuffle_ps(load<__m256>(from), load<__m256>(from + 32), 0xdd);
    return u32x8(_mm256_permute4x64_epi64(_mm256_castps_si256(picked), 0xd8));
#else
    u32x8 v;
    for (int i = 0; i < 8; ++i) v[i] = load<uint32_t>(from + 8 * i + 4);
    return v;
#endif
}

// The even ones of sixteen numbers in a row, and the odd ones.
DSV4_INLINE void apart(const float* from, float* evens, float* odds) {
    f32x8 a = load<f32x8>(from), b = load<f32x8>(from + 8);
#if DSV4_AVX2
    auto picked = [](__m256 v) { return f32x8(_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8))); };
    store(evens, picked(_mm256_shuffle_ps(__m256(a), __m256(b), 0x88)));
    store(odds, picked(_mm256_shuffle_ps(__m256(a), __m256(b), 0xdd)));
#else
    store(evens, f32x8{a[0], a[2], a[4], a[6], b[0], b[2], b[4], b[6]});
    store(odds, f32x8{a[1], a[3], a[5], a[7], b[1], b[3], b[5], b[7]});
#endif
}

// Eight rows of eight fours of bytes; body(p, v) for each column of fours, p from 0 to 7.
template <class Body>
DSV4_INLINE void turned(const uint8_t* rows, Body&& body) {
#if DSV4_AVX2
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        // Fours of row i and, in the upper half, of row i + 4: two instructions that are no shuffles.
        auto both = [&](int i) {
            __m256i low = _mm256_castsi128_si256(load<__m128i>(rows + 32 * i + 16 * half));
            return _mm256_inserti128_si256(low, load<__m128i>(rows + 32 * (i + 4) + 16 * half), 1);
        };
        __m256i a = both(0), b = both(1), c = both(2), d = both(3);
        __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
        body(4 * half, u8x32(_mm256_unpacklo_epi64(ab, cd)));
        body(4 * half + 1, u8x32(_mm256_unpackhi_epi64(ab, cd)));
        ab = _mm256_unpackhi_epi32(a, b), cd = _mm256_unpackhi_epi32(c, d);
        body(4 * half + 2, u8x32(_mm256_unpacklo_epi64(ab, cd)));
        body(4 * half + 3, u8x32(_mm256_unpackhi_epi64(ab, cd)));
    }
#else
    for (int p = 0; p < 8; ++p) {
        u32x8 v;
        for (int i = 0; i < 8; ++i) v[i] = load<uint32_t>(rows + 32 * i + 4 * p);
        body(p, bits<u8x32>(v));
    }
#endif
}

// The low nibbles of 16 bytes, then their high ones.
DSV4_INLINE u8x32 nibbles(const uint8_t* from) {
#if DSV4_AVX2
    const __m256i down = _mm256_set_epi32(4, 4, 4, 4, 0, 0, 0, 0);
    __m256i pairs = _mm256_broadcastsi128_si256(load<__m128i>(from));
    return u8x32(_mm256_srlv_epi32(pairs, down)) & 15;
#else
    u8x16 pairs = load<u8x16>(from), parts[2] = {pairs & 15, pairs >> 4};
    return load<u8x32>(parts);
#endif
}

// table[index] for 32 indices below 16.
DSV4_INLINE u8x32 look_up(u8x16 table, u8x32 index) {
#if DSV4_AVX2
    return u8x32(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(__m128i(table)), __m256i(index)));
#elif DSV4_NEON
    uint8x16_t t = load<uint8x16_t>(&table);
    uint8x16_t parts[2] = {vqtbl1q_u8(t, load<uint8x16_t>(&index)),
                           vqtbl1q_u8(t, load<uint8x16_t>(reinterpret_cast<const char*>(&index) + 16))};
    return load<u8x32>(parts);
#else
    u8x32 found;
    for (int i = 0; i < 32; ++i) found[i] = table[index[i] & 15];
    return found;
#endif
}

// table[nibble] for the low nibbles of 16 bytes, then for their high ones.
DSV4_INLINE u8x32 look_up_nibbles(u8x16 table, const uint8_t* from) {
#if DSV4_AVX2 && defined(__AVX512VBMI__) && defined(__AVX512VL__)
    // Looks at five bits of each byte; with the table twice in a row it does not matter what the fifth is.
    const __m256i down = _mm256_set_epi32(4, 4, 4, 4, 0, 0, 0, 0);
    __m256i nibbles = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(load<__m128i>(from)), down);
    return u8x32(_mm256_maskz_permutexvar_epi8(~0u, nibbles, _mm256_broadcastsi128_si256(__m128i(table))));
#else
    return look_up(table, nibbles(from));
#endif
}

// Four times seven bits of each number, each seven with an eighth that makes the number of ones even.
DSV4_INLINE u32x8 with_eighths(u32x8 v) {
#if DSV4_AVX2 && defined(__AVX512VBMI__) && defined(__AVX512BITALG__) && defined(__AVX512VL__)
    const __m256i places = _mm256_set1_epi64x(0x352e2720150e0700), eighths = _mm256_set1_epi8(char(0x80));
    __m256i sevens = _mm256_andnot_si256(eighths, _mm256_maskz_multishift_epi64_epi8(~0u, places, __m256i(v)));
    __m256i odd = _mm256_slli_epi16(_mm256_popcnt_epi8(sevens), 7);
    return u32x8(sevens | (odd & eighths));
#else
    u32x8 sevens = (v & 0x7fu) | (v << 1 & 0x7f00u) | (v << 2 & 0x7f0000u) | (v << 3 & 0x7f000000u);
    u32x8 odd = sevens ^ sevens >> 4;
    odd ^= odd >> 2;
    odd ^= odd >> 1;
    return sevens | (odd & 0x01010101u) << 7;
#endif
}

// A table of 16 bits for each byte.
struct Codes {
    alignas(64) uint8_t low[256], high[256];
};

#if DSV4_AVX2 && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define DSV4_LOOKS_UP_MANY 1

DSV4_INLINE __m512i look_up_64(const uint8_t* table, __m512i index, __mmask64 upper) {
    __m512i from_low = _mm512_permutex2var_epi8(load<__m512i>(table), index, load<__m512i>(table + 64));
    __m512i from_high = _mm512_permutex2var_epi8(load<__m512i>(table + 128), index, load<__m512i>(table + 192));
    return _mm512_mask_blend_epi8(upper, from_low, from_high);
}

// The codes of 64 bytes in a row.
DSV4_INLINE void look_up_row(const Codes& codes, const uint8_t* from, uint16_t* to) {
    __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    __m512i index = _mm512_maskz_permutexvar_epi64(0xff, order, load<__m512i>(from));
    __mmask64 upper = _mm512_movepi8_mask(index);
    __m512i low = look_up_64(codes.low, index, upper), high = look_up_64(codes.high, index, upper);
    store_apart(to, _mm512_maskz_unpacklo_epi8(~0ull, low, high));
    store_apart(to + 32, _mm512_maskz_unpackhi_epi8(~0ull, low, high));
}

// 32 bytes of `sizes`, chosen by three bits each of eight codes; bits above are passed over, since sizes repeat.
DSV4_INLINE u8x32 sizes_of_eights(const uint16_t* codes, const uint8_t* sizes) {
    const __m256i places = _mm256_set1_epi64x(0x1916131009060300);
    __m256i spread = _mm256_maskz_multishift_epi64_epi8(~0u, places, _mm256_cvtepu32_epi64(load<__m128i>(codes)));
    return u8x32(_mm256_maskz_permutexvar_epi8(~0u, spread, load<__m256i>(sizes)));
}
#endif

// Two bits of every byte: (v >> shift) & 3, and the like. Bytes cannot be shifted as such everywhere, wider lanes can.
template <int SHIFT>
DSV4_INLINE u8x32 field(u8x32 v, uint8_t mask) {
    if constexpr (SHIFT == 0) return v & mask;
    return bits<u8x32>(bits<u32x8>(v) >> SHIFT) & mask;
}

}  // namespace dsv4
