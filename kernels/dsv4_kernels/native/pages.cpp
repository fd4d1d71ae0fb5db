// A page that is touched before it was read costs a wait for the disk, and has the system read what lies around it, which for
// experts is other experts. Asked for by their ranges, all of a layer's experts are read at once and nothing else is.
#include "pages.h"

#include <algorithm>
#include <atomic>

#include "api.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace dsv4 {
namespace {

std::atomic<int64_t> at_once{0};  // bytes of one request, 0 where nobody asks

void ask(const uint8_t* from, int64_t bytes) {
#if defined(MADV_WILLNEED)
    static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    uintptr_t begin = uintptr_t(from) / page * page, end = uintptr_t(from) + uintptr_t(bytes), step = uintptr_t(at_once.load());
    for (; step && begin < end; begin += step) madvise(reinterpret_cast<void*>(begin), std::min(step, end - begin), MADV_WILLNEED);
#else
    (void)from, (void)bytes;
#endif
}

}  // namespace

bool asks_ahead() { return at_once.load(std::memory_order_relaxed) > 0; }

void ask_for(const Weight& weight) {
    ask(weight.data, weight.rows * weight.row_bytes);
    int64_t scale_rows = weight.format == FP8 ? (weight.rows + 127) / 128 : weight.rows;
    if (weight.scales) ask(weight.scales, scale_rows * weight.scale_cols * (weight.float_scales ? 4 : 1));
}

}  // namespace dsv4

// Asks for these of `all` experts, each gate, up and down.
DSV4_API void dsv4_ask_for(const void* all, const int64_t* numbers, int64_t count) {
    const dsv4::Weight* weights = static_cast<const dsv4::Weight*>(all);
    for (int64_t i = 0; dsv4::asks_ahead() && i < 3 * count; ++i) dsv4::ask_for(weights[3 * numbers[i / 3] + i % 3]);
}

// From now on experts are asked for before they are multiplied, `bytes` (whole pages) with each request; 0: no longer.
DSV4_API void dsv4_ask_ahead(int64_t bytes) { dsv4::at_once = bytes; }
