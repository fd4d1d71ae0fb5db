// What a cache keeps of rows of float32: float32 again, or bfloat16, rounded to the nearest, ties to even.
#include <cstring>
#include <vector>

#include "api.h"
#include "pool.h"
#include "queue.h"
#include "steps.h"

using namespace dsv4;

namespace {

uint16_t to_bf16(float x) {
    uint32_t code = bits<uint32_t>(x);
    return x == x ? uint16_t((code + 0x7fffu + (code >> 16 & 1u)) >> 16) : uint16_t(0x7fc0);
}

void keep(const float* x, int64_t count, int64_t bf16, void* to) {
    if (!bf16) {
        std::memcpy(to, x, size_t(count) * sizeof(float));
        return;
    }
    uint16_t* codes = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) codes[i] = to_bf16(x[i]);
}

constexpr int64_t GRAIN = int64_t(1) << 14;  // values that one thread makes keys of sooner than two

struct Keys {
    const float *x, *norm;
    float eps;
    const float* turns;
    int64_t rows, d, pairs;
    Rounding rounding;
    int64_t block, bf16;
    char* to;
    const int64_t* first;  // row of `to` that is the first to be written; null: the first there is
};

void keep_keys(const Keys& k) {
    int64_t row_bytes = k.d * (k.bf16 ? 2 : 4);
    char* to = k.to + (k.first ? *k.first : 0) * row_bytes;
    parallel(k.rows, items_for(GRAIN, k.d), [&](int64_t begin, int64_t end) {
        thread_local std::vector<float> memory;
        memory.resize(std::max(memory.size(), size_t(k.d)));
        float* key = memory.data();
        for (int64_t row = begin; row < end; ++row) {
            norm_row(k.x + row * k.d, k.norm, k.d, k.eps, key);
            turn_pairs(key + k.d - 2 * k.pairs, k.turns + row * 2 * k.pairs, k.pairs, 1.0f);
            round_row_for_cache(key, k.d, k.rounding, 2 * k.pairs, k.block);
            keep(key, k.d, k.bf16, to + row * row_bytes);
        }
    });
}

}  // namespace

// x [count] -> to [count], of float32 or bfloat16.
DSV4_API void dsv4_keep(const float* x, int64_t count, int64_t bf16, void* to) {
    submit([=] { keep(x, count, bf16, to); });
}

// x [rows, d], norm [d], turns [rows, pairs] of cosine and sine -> to [rows, d]: normed, turned, rounded (an enum Rounding, with its
// block) and kept as float32 or bfloat16. With first, a number that is read when its turn comes, `to` begins so many rows earlier.
DSV4_API void dsv4_keep_keys(const float* x, const float* norm, float eps, const float* turns, int64_t rows, int64_t d,
                             int64_t pairs, int64_t rounding, int64_t block, int64_t bf16, void* to,
                             const int64_t* first) {
    Keys keys{x, norm, eps, turns, rows, d, pairs, Rounding(rounding), block, bf16, static_cast<char*>(to), first};
    submit([=] { keep_keys(keys); });
}
