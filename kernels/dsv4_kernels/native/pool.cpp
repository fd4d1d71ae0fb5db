// A pool whose workers spin for a moment before they sleep: between two kernels of one token lie microseconds of Python, and
// waking a sleeper would cost more than the kernel. They sleep soon after, so that torch's own threads find the cores free.
#include "pool.h"

#include "api.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define DSV4_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define DSV4_PAUSE() __asm__ volatile("yield")
#else
#define DSV4_PAUSE() std::this_thread::yield()
#endif

namespace dsv4 {
namespace {

constexpr auto SPIN = std::chrono::microseconds(150);

thread_local int index_of_this_thread = 0;
thread_local bool inside = false;

class Pool {
public:
    // cpus[i] is where thread i is pinned. The caller, thread 0, goes where the system puts it, but see step_aside.
    Pool(int count, std::vector<int> places) : cpus(std::move(places)) {
        for (int i = 1; i < count; ++i) {
            int cpu = i < int(cpus.size()) ? cpus[i] : -1;
            workers.emplace_back([this, i, cpu] { work(i, cpu); });
        }
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(sleep);
            stopping = true;
            generation.fetch_add(1);
        }
        wake.notify_all();
        for (auto& worker : workers) worker.join();
    }

    int size() const { return int(workers.size()) + 1; }

    void run(int64_t count, int64_t grain, const Body& body) {
        step_aside();
        job = &body;
        total = count;
        step = grain;
        next.store(0, std::memory_order_relaxed);
        busy.store(int(workers.size()), std::memory_order_relaxed);
        {
            // The lock keeps a worker from going to sleep between its last look and the change.
            std::lock_guard<std::mutex> lock(sleep);
            generation.fetch_add(1, std::memory_order_release);
        }
        if (sleepers.load() > 0) wake.notify_all();
        take();
        while (busy.load(std::memory_order_acquire) != 0) DSV4_PAUSE();
    }

private:
    void take() {
        inside = true;
        for (int64_t begin; (begin = next.fetch_add(step, std::memory_order_relaxed)) < total;)
            (*job)(begin, std::min(begin + step, total));
        inside = false;
    }

    void work(int index, int cpu) {
        index_of_this_thread = index;
        pin(cpu);
        for (uint64_t seen = 0;;) {
            seen = await(seen);
            if (stopping) return;
            take();
            busy.fetch_sub(1, std::memory_order_release);
        }
    }

    uint64_t await(uint64_t seen) {
        auto until = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < 64; ++i) {
                uint64_t now = generation.load(std::memory_order_acquire);
                if (now != seen) return now;
                DSV4_PAUSE();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(sleep);
        sleepers.fetch_add(1);
        wake.wait(lock, [&] { return generation.load(std::memory_order_acquire) != seen; });
        sleepers.fetch_sub(1);
        return generation.load(std::memory_order_acquire);
    }

    // A caller on a worker's processor would share it for as long as the system likes, at a third of the speed, while its own
    // stands idle. It is moved there once and stays free to go.
    void step_aside() const {
#if defined(__linux__)
        int here = sched_getcpu();
        if (cpus.size() < 2 || std::find(cpus.begin() + 1, cpus.end(), here) == cpus.end()) return;
        cpu_set_t before;
        if (pthread_getaffinity_np(pthread_self(), sizeof before, &before) != 0 || !CPU_ISSET(cpus[0], &before)) return;
        pin(cpus[0]);
        pthread_setaffinity_np(pthread_self(), sizeof before, &before);
#endif
    }

    static void pin(int cpu) {
#if defined(__linux__)
        if (cpu < 0) return;
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
        (void)cpu;
#endif
    }

    std::vector<int> cpus;
    std::vector<std::thread> workers;
    const Body* job = nullptr;
    int64_t total = 0, step = 1;
    std::atomic<int64_t> next{0};
    std::atomic<int> busy{0}, sleepers{0};
    std::atomic<uint64_t> generation{0};
    bool stopping = false;
    std::mutex sleep;
    std::condition_variable wake;
};

Pool* pool = nullptr;  // never destroyed at exit: a worker must not be joined while the process is torn down
std::mutex callers;    // held by whoever uses the pool

void forget_workers() { pool = nullptr; }  // in a forked child there are none

}  // namespace

int threads() { return pool ? pool->size() : 1; }

int thread_index() { return index_of_this_thread; }

void run_parallel(int64_t count, int64_t grain, const Body& body) {
    std::unique_lock<std::mutex> lock(callers, std::defer_lock);
    if (inside || !lock.try_lock() || !pool) {
        body(0, count);
        return;
    }
    pool->run(count, grain, body);
}

}  // namespace dsv4

// Replaces the pool by one of `count` threads. cpus: a processor for each, the caller first, or none.
DSV4_API void dsv4_set_threads(int count, const int* cpus, int cpu_count) {
    std::lock_guard<std::mutex> lock(dsv4::callers);
#if defined(__linux__)
    static bool registered = (pthread_atfork(nullptr, nullptr, dsv4::forget_workers), true);
    (void)registered;
#endif
    delete dsv4::pool;
    dsv4::pool = count > 1 ? new dsv4::Pool(count, std::vector<int>(cpus, cpus + cpu_count)) : nullptr;
}

DSV4_API int dsv4_threads() { return dsv4::threads(); }
