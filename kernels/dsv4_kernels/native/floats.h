// Numbers that are floats already, of four widths: eight at a time, or one.
#pragma once

#include "simd.h"

namespace dsv4 {

struct F32Format {
    static constexpr int BYTES = 4;
    static DSV4_INLINE f32x8 eight(const uint8_t* from) { return load<f32x8>(from); }
    static float one(const uint8_t* from) { return load<float>(from); }
};
struct F16Format {
    static constexpr int BYTES = 2;
    static DSV4_INLINE f32x8 eight(const uint8_t* from) { return halves_at(from); }
    static float one(const uint8_t* from) { return half_at(from); }
};
struct BF16Format {
    static constexpr int BYTES = 2;
    static DSV4_INLINE f32x8 eight(const uint8_t* from) { return bf16_at(from); }
    static float one(const uint8_t* from) { return bits<float>(uint32_t(load<uint16_t>(from)) << 16); }
};
struct FP8Format {
    static constexpr int BYTES = 1;
    static DSV4_INLINE f32x8 eight(const uint8_t* from) { return e4m3_at(from); }
    static float one(const uint8_t* from) { return bits<float>(uint32_t(*from & 0x80) << 24 | uint32_t(*from & 0x7f) << 20) * 0x1p120f; }
};

}  // namespace dsv4
