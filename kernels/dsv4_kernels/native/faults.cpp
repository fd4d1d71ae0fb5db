// A mapped file that is cut short, or whose disk fails, answers a read with a signal that ends the process. For files that are
// watched here the missing bytes become zeros instead, and whoever computed with them is told afterwards.
#include <atomic>
#include <cstdint>

#include "api.h"

#if defined(__unix__) || defined(__APPLE__)
#include <csignal>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

namespace {

struct Watched {
    std::atomic<uintptr_t> begin{0}, end{0};
    std::atomic<int64_t> lost{-1};  // the first byte that could not be read
};

constexpr int MOST = 4096;  // files; the largest release has a few hundred
Watched watched[MOST];
std::atomic<int> used{0};
std::mutex changing;
struct sigaction before;
uintptr_t page;

// Runs on the thread that read, in the middle of whatever it did: nothing but system calls and atomics.
void on_bus_error(int signal, siginfo_t* info, void* context) {
    uintptr_t address = uintptr_t(info->si_addr);
    for (int i = 0; i < used.load(); ++i) {
        Watched& file = watched[i];
        uintptr_t begin = file.begin.load(), end = file.end.load();
        if (address < begin || address >= end) continue;
        uintptr_t from = address / page * page;
        void* there = mmap(reinterpret_cast<void*>(from), end - from, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        if (there == MAP_FAILED) break;
        int64_t none = -1;
        file.lost.compare_exchange_strong(none, int64_t(from - begin));
        return;
    }
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(signal, info, context);
    else
        sigaction(SIGBUS, &before, nullptr);  // not ours: on return it comes again, and does what it did before us
}

}  // namespace

// Watches a mapping of `bytes` bytes; the number it goes by, -1 where there are too many.
DSV4_API int64_t dsv4_watch(const uint8_t* from, int64_t bytes) {
    std::lock_guard<std::mutex> lock(changing);
    if (!page) {
        page = uintptr_t(sysconf(_SC_PAGESIZE));
        struct sigaction ours = {};
        ours.sa_sigaction = on_bus_error;
        ours.sa_flags = SA_SIGINFO;
        sigaction(SIGBUS, &ours, &before);
    }
    int place = 0;
    while (place < used && watched[place].end) ++place;
    if (place == MOST) return -1;
    watched[place].lost = -1;
    watched[place].begin = uintptr_t(from);
    watched[place].end = uintptr_t(from) + uintptr_t(bytes);
    if (place == used) ++used;
    return place;
}

DSV4_API void dsv4_unwatch(int64_t number) {
    std::lock_guard<std::mutex> lock(changing);
    watched[number].end = 0;
}

// The first byte that could not be read, -1 where all could.
DSV4_API int64_t dsv4_lost(int64_t number) { return watched[number].lost; }

#else

DSV4_API int64_t dsv4_watch(const uint8_t*, int64_t) { return -1; }
DSV4_API void dsv4_unwatch(int64_t) {}
DSV4_API int64_t dsv4_lost(int64_t) { return -1; }

#endif
