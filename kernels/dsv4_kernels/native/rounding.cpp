// Rounding to 8 and 4 bits under a power of two, to bf16, and the Hadamard turn. Equal to ref.py bit for bit (but for the order
// of the turn's sums), so that it does not matter who rounded what a cache holds.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "pool.h"
#include "queue.h"
#include "steps.h"

using namespace dsv4;

namespace {

constexpr int64_t GRAIN = int64_t(1) << 14;  // values that one thread rounds sooner than two
constexpr uint32_t SIGN = 0x80000000u, EXPONENT = 0x7f800000u, MANTISSA = 0x007fffffu;

// E4M3: eight codes to a power of two, from 2^-6 on; below they lie as far apart as there.
struct FP8 {
    static constexpr float least = 1e-4f, inverse = float(1 / 448.0);
    static constexpr uint32_t first = (127 - 6) << 23;
    static constexpr float magic = 1.5f * 0x1p20f;  // times a power of two: a number whose last bit is an eighth of it
};

// E2M1: two codes to a power of two, from 1 on.
struct FP4 {
    static constexpr float least = 6.0f * 0x1p-126f, inverse = float(1 / 6.0);
    static constexpr uint32_t first = 127 << 23;
    static constexpr float magic = 1.5f * 0x1p22f;
};

DSV4_INLINE f32x8 size_of(f32x8 v) { return bits<f32x8>(bits<u32x8>(v) & ~SIGN); }

// The nearest code's value. Adding a number whose last bit is the codes' step, and taking it away again, rounds as wanted. Above
// the largest code lies no v, but by a last bit that the scale's own rounding left, and that is rounded away.
template <class Code>
DSV4_INLINE f32x8 nearest(f32x8 v) {
    f32x8 size = size_of(v);
    u32x8 power = bits<u32x8>(size) & EXPONENT;
    f32x8 magic = bits<f32x8>(power < Code::first ? power * 0 + Code::first : power) * splat(Code::magic);
    f32x8 rounded = size + magic - magic;
    return bits<f32x8>(bits<u32x8>(rounded) | (bits<u32x8>(v) & SIGN));
}

// A full mantissa, added to the ratio, carries into the exponent unless it meets zero: the ratio's next power of two.
template <class Code>
float scale_for(float greatest) {
    float ratio = std::max(greatest, Code::least) * Code::inverse;
    return bits<float>((bits<uint32_t>(ratio) + MANTISSA) & EXPONENT);
}

template <class Code>
void round_block(const float* x, int64_t block, float* out) {
    f32x8 most = {};
    by_eights(block, [&](int64_t i, auto part) {
        f32x8 size = size_of(load(x + i, part));
        most = size > most ? size : most;
    });
    float greatest = 0;
    for (int i = 0; i < 8; ++i) greatest = std::max(greatest, most[i]);
    float scale = scale_for<Code>(greatest);
    f32x8 up = splat(scale), down = splat(1 / scale);
    by_eights(block, [&](int64_t i, auto part) { store(out + i, nearest<Code>(load(x + i, part) * down) * up, part); });
}

template <class Code>
void round_row(const float* x, int64_t n, int64_t block, float* out) {
    for (int64_t i = 0; i < n; i += block) round_block<Code>(x + i, block, out + i);
}

template <class Code>
void round_all(const float* x, int64_t blocks, int64_t block, float* out) {
    parallel(blocks, items_for(GRAIN, block), [&](int64_t begin, int64_t end) {
        round_row<Code>(x + begin * block, (end - begin) * block, block, out + begin * block);
    });
}

// To bf16 and back, ties to even. What is no number must not become infinity by the rounding.
DSV4_INLINE f32x8 through_bf16(f32x8 v) {
    u32x8 code = bits<u32x8>(v);
    f32x8 rounded = bits<f32x8>((code + 0x7fffu + (code >> 16 & 1u)) & 0xffff0000u);
    return v == v ? rounded : v;
}

// The turn of eight values: three times sums and differences, of neighbours, of pairs and of fours.
DSV4_INLINE f32x8 turn_eight(f32x8 v) {
    const f32x8 ones = {1, -1, 1, -1, 1, -1, 1, -1}, pairs = {1, 1, -1, -1, 1, 1, -1, -1}, fours = {1, 1, 1, 1, -1, -1, -1, -1};
    v = v * ones + f32x8{v[1], v[0], v[3], v[2], v[5], v[4], v[7], v[6]};
    v = v * pairs + f32x8{v[2], v[3], v[0], v[1], v[6], v[7], v[4], v[5]};
    return v * fours + f32x8{v[4], v[5], v[6], v[7], v[0], v[1], v[2], v[3]};
}

// One stage of a longer turn: sums and differences of values `apart` from each other.
template <class V>
DSV4_INLINE void add_and_subtract(float* x, int64_t n, int64_t apart) {
    constexpr int64_t width = sizeof(V) / sizeof(float);
    for (int64_t start = 0; start < n; start += 2 * apart)
        for (int64_t i = start; i < start + apart; i += width) {
            V a = load<V>(x + i), b = load<V>(x + i + apart);
            store(x + i, a + b);
            store(x + i + apart, a - b);
        }
}

void turn_row(const float* x, int64_t n, float* out) {
    float factor = float(1 / std::sqrt(double(n)));
    if (n < 8) {
        for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
        for (int64_t apart = 1; apart < n; apart *= 2) add_and_subtract<float>(out, n, apart);
        return;
    }
    for (int64_t i = 0; i < n; i += 8) store(out + i, turn_eight(load<f32x8>(x + i)) * splat(factor));
    for (int64_t apart = 8; apart < n; apart *= 2) add_and_subtract<f32x8>(out, n, apart);
}

void round_kv(const float* x, int64_t rows, int64_t d, int64_t rotated, int64_t block, float* out) {
    parallel(rows, items_for(GRAIN, d), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            std::memcpy(out + row * d, x + row * d, size_t(d) * sizeof(float));
            round_row_for_cache(out + row * d, d, KV, rotated, block);
        }
    });
}

void hadamard(const float* x, int64_t rows, int64_t n, int64_t block, float* out) {
    parallel(rows, items_for(GRAIN, n), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            turn_row(x + row * n, n, out + row * n);
            if (block) round_row<FP4>(out + row * n, n, block, out + row * n);
        }
    });
}

}  // namespace

void dsv4::round_row_for_cache(float* x, int64_t d, Rounding rounding, int64_t rotated, int64_t block) {
    if (rounding == KV) {
        round_row<FP8>(x, d - rotated, block, x);
        by_eights(rotated, [&](int64_t i, auto part) {
            float* turned = x + d - rotated + i;
            store(turned, through_bf16(load(turned, part)), part);
        });
    } else if (rounding == INDEX) {
        turn_row(x, d, x);
        round_row<FP4>(x, d, block, x);
    }
}

// x [blocks, block] -> out [blocks, block].
DSV4_API void dsv4_round_fp8(const float* x, int64_t blocks, int64_t block, float* out) {
    submit([=] { round_all<FP8>(x, blocks, block, out); });
}

DSV4_API void dsv4_round_fp4(const float* x, int64_t blocks, int64_t block, float* out) {
    submit([=] { round_all<FP4>(x, blocks, block, out); });
}

// x [rows, d] -> out [rows, d]: all but the last `rotated` values to FP8 in blocks, those to bf16.
DSV4_API void dsv4_round_kv(const float* x, int64_t rows, int64_t d, int64_t rotated, int64_t block, float* out) {
    submit([=] { round_kv(x, rows, d, rotated, block, out); });
}

// x [rows, n], n a power of two -> out [rows, n]: turned, and with a block also rounded to FP4.
DSV4_API void dsv4_hadamard(const float* x, int64_t rows, int64_t n, int64_t block, float* out) {
    submit([=] { hadamard(x, rows, n, block, out); });
}
