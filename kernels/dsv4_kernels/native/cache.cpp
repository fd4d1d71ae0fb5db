// What a cache keeps of rows of float32: float32 again, or bfloat16, rounded to the nearest, ties to even.
#include <cstring>

#include "api.h"
#include "queue.h"
#include "simd.h"

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

}  // namespace

// x [count] -> to [count], of float32 or bfloat16.
DSV4_API void dsv4_keep(const float* x, int64_t count, int64_t bf16, void* to) {
    submit([=] { keep(x, count, bf16, to); });
}
