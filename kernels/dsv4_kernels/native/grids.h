// The look-up tables of the IQ formats. A code of eight bits stands for a point: the sizes of a few weights (signs lie beside).
// Looking points up one by one costs more than all that is then done with them. Where the processor can look 64 bytes up at
// once (LOOKS_UP_MANY), it finds 16 bits for each point instead, from which the few sizes there are follow.
#pragma once

#include <algorithm>

#include "simd.h"

namespace dsv4 {

// Points of COUNT weights, each of at most 2^BITS different sizes.
template <int COUNT, int BITS>
struct Grid {
    uint8_t points[256][COUNT];
    alignas(64) Codes codes;       // of each point: for each weight, from the lowest bits on, which of `sizes` it has
    alignas(32) uint8_t sizes[32]; // again and again

    void set(const uint8_t* from) {
        std::memcpy(points, from, sizeof points);
        uint8_t known[256 * COUNT];
        std::memcpy(known, from, sizeof known);
        std::sort(known, known + sizeof known);
        int64_t count = std::unique(known, known + sizeof known) - known;
        for (int i = 0; i < 32; ++i) sizes[i] = known[std::min<int64_t>(i % (1 << BITS), count - 1)];
        for (int point = 0; point < 256; ++point) {
            int code = 0;
            for (int i = 0; i < COUNT; ++i) code |= int(std::lower_bound(known, known + count, points[point][i]) - known) << BITS * i;
            codes.low[point] = uint8_t(code);
            codes.high[point] = uint8_t(code >> 8);
        }
    }
};

extern Grid<8, 2> iq2_xxs_grid;
extern Grid<4, 3> iq3_xxs_grid;

// Sizes of the weights of eight blocks whose points' codes lie in the even fours of 64 bytes.
class IQ2Sizes {
public:
    DSV4_INLINE void set(const uint8_t* codes) { from = codes; }
    DSV4_INLINE u8x32 of_block(int j) const {
        const uint8_t* p = from + 8 * j;
        const auto& points = iq2_xxs_grid.points;
        return bits<u8x32>(u64x4{load<uint64_t>(points[p[0]]), load<uint64_t>(points[p[1]]), load<uint64_t>(points[p[2]]),
                                 load<uint64_t>(points[p[3]])});
    }

private:
    const uint8_t* from;
};

// The same for codes in 64 bytes in a row.
class IQ3Sizes {
public:
#if DSV4_LOOKS_UP_MANY
    DSV4_INLINE void set(const uint8_t* from) { look_up_row(iq3_xxs_grid.codes, from, found); }
    DSV4_INLINE u8x32 of_block(int j) const { return sizes_of_eights(found + 8 * j, iq3_xxs_grid.sizes); }

private:
    alignas(64) uint16_t found[64];
#else
    DSV4_INLINE void set(const uint8_t* codes) { from = codes; }
    DSV4_INLINE u8x32 of_block(int j) const {
        u32x8 sizes;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sizes[i] = load<uint32_t>(iq3_xxs_grid.points[from[8 * j + i]]);
        return bits<u8x32>(sizes);
    }

private:
    const uint8_t* from;
#endif
};

}  // namespace dsv4
