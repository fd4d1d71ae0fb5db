// A matrix as it lies in its file, handed over by library.py, and the rows of activations that it is multiplied with.
#pragma once

#include <cstdint>

namespace dsv4 {

// Numbers are those of library.FORMATS.
enum Format : int32_t { F32, F16, BF16, FP8, Q8_0, MXFP4, FP4, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ2_XXS, IQ3_XXS, FORMATS };

struct Weight {
    const uint8_t* data;
    const uint8_t* scales;  // of FP8 and FP4, which keep them apart
    int64_t rows, cols;
    int64_t row_bytes;
    int64_t scale_cols;    // scales in a row of them
    int32_t format;
    int32_t float_scales;  // they are float32, not E8M0
    int32_t exact;         // its products may not round activations to bytes
};

// x [rows, cols] as float32 and, where a format multiplies bytes, as bytes: x ~ d * q, with one d for 32 values in a row.
//
// Blocks are counted in whole groups of eight: what lies behind a row's last block is zero. `lanes` and `first_offsets` are
// there if there are more than FEW rows.
struct Activations {
    const float* x;
    int64_t cols;
    const int8_t* q = nullptr;     // [rows, cols], in the order in which the format's blocks unpack
    const int8_t* lanes = nullptr; // [rows, groups, 256]: the same for tiles, four values of each block in turn (see lanes.h)
    const float* d = nullptr;      // [rows, groups, 8]
    const float* sum16 = nullptr;  // [rows, cols / 16]: sums of 16 rounded values, for formats with a minimum
    const float* sum32 = nullptr;  // [rows, cols / 32]
    const int32_t* offsets = nullptr;        // [rows, groups, 8]: -128 times the sum of a block's rounded values
    const int32_t* first_offsets = nullptr;  // the same of its first half
};

constexpr int64_t FEW = 3;  // tokens up to which unpacking rows again for each is cheaper than a tile

// Groups of eight blocks of 32, the last of which may be short.
inline int64_t whole_groups(int64_t cols) { return (cols + 255) / 256; }

// Which of these rows a product takes, in order: first, first + stride, ..., or those of a list.
struct Picked {
    int64_t count;
    int64_t first = 0, stride = 1;
    const int32_t* list = nullptr;

    int64_t operator[](int64_t i) const { return list ? list[i] : first + i * stride; }
};

// How rounded activations follow one another: as they come; of each 32 the even ones first; or of each 256 every eighth, eight
// times over (see planes.cpp).
enum class Order : uint8_t { PLAIN, SPLIT, PLANES };

// What a weight wants of the activations.
struct Wants {
    bool bytes;  // rounded to bytes; else float32 only
    Order order;
    bool sums;
};

inline bool same(Wants a, Wants b) { return a.bytes == b.bytes && a.order == b.order && a.sums == b.sums; }

Wants wants(const Weight& weight);

// Rounds rows of x [count, cols] and returns them; the memory belongs to the calling thread until its next call with the
// same slot (0 or 1).
Activations rounded(const float* x, int64_t count, int64_t cols, Wants wants, int slot);

// y[i * y_stride + row - begin] = weight[row] . x[picked[i]] for rows begin .. end.
void multiply(const Weight& weight, int64_t begin, int64_t end, const Activations& x, const Picked& picked, float* y,
              int64_t y_stride);

// One row [cols] as floats.
void widen(const Weight& weight, int64_t row, float* to);

// Rows that make a piece of work worth handing to a thread, few enough that none of them waits long for the others.
int64_t rows_per_piece(int64_t rows, int64_t cols, int64_t tokens);

}  // namespace dsv4
