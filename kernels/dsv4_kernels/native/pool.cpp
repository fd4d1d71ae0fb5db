// A pool whose workers spin for a moment before they sleep: between two kernels of one token lie microseconds of Python, and
// waking a sleeper would cost more than the kernel. They sleep soon after, so that torch's own threads find the cores free.
//
// While calls are queued (see queue.h), worker 1 is the conductor: it computes them in order while Python is still writing down
// the next ones, with the other workers' help and, once Python waits, with the caller's.
#include "pool.h"
#include "queue.h"

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
constexpr uint64_t OPEN = 1 << 16, INSIDE = OPEN - 1;  // of Pool::state; above them the number of the job

thread_local int index_of_this_thread = 0;
thread_local bool inside = false;      // a piece of a job
thread_local bool queueing = false;    // submit writes down
thread_local Tape* tape = nullptr;     // where it writes, if not into the queue
thread_local bool conducting = false;  // what was written down

class Pool {
public:
    // cpus[i] is where thread i is pinned. The caller, thread 0, goes where the system puts it, but see step_aside.
    Pool(int count, std::vector<int> places) : cpus(std::move(places)), shares(count) {
        for (int i = 1; i < count; ++i) {
            int cpu = i < int(cpus.size()) ? cpus[i] : -1;
            workers.emplace_back([this, i, cpu] { work(i, cpu); });
        }
    }

    ~Pool() {
        stopping = true;
        wake();
        for (auto& worker : workers) worker.join();
    }

    int size() const { return int(workers.size()) + 1; }

    // The calling thread and those that come to help take pieces until there are none; it does not wait for those that do not.
    void run(int64_t count, int64_t grain, const Body& body) {
        if (!conducting) step_aside();
        job = &body;
        deal(count, grain);
        state.store(++jobs * 2 * OPEN | OPEN);
        wake();
        take();
        state.fetch_and(~OPEN);
        while (state.load(std::memory_order_acquire) & INSIDE) DSV4_PAUSE();
    }

    Queue queue;

    // To be called after every push.
    void announce() {
        if (!lazy) wake();
    }

    void begin(bool wait_for_drain) {
        lazy = wait_for_drain;
        step_aside();
    }

    // Helps until all that was pushed has been computed.
    void drain() {
        lazy = false;
        wake();
        step_aside();
        for (uint64_t seen = 0; !queue.empty();)
            if (!help(seen)) DSV4_PAUSE();
    }

private:
    // A run of neighbours for each thread, since what lies in a row comes faster from memory than every other piece of it.
    void deal(int64_t count, int64_t grain) {
        int64_t pieces = (count + grain - 1) / grain, n = int64_t(shares.size());
        step = grain;
        for (int64_t i = 0; i < n; ++i) {
            shares[i].next.store(pieces * i / n * grain, std::memory_order_relaxed);
            shares[i].end = std::min(pieces * (i + 1) / n * grain, count);
        }
    }

    // The pieces of this thread's share, then what others have not come to yet.
    void take() {
        inside = true;
        for (size_t i = 0; i < shares.size(); ++i) {
            Share& share = shares[(size_t(index_of_this_thread) + i) % shares.size()];
            for (int64_t begin; (begin = share.next.fetch_add(step, std::memory_order_relaxed)) < share.end;)
                (*job)(begin, std::min(begin + step, share.end));
        }
        inside = false;
    }

    // Takes part in the open job, if there is one that this thread has not seen the end of.
    bool help(uint64_t& seen) {
        uint64_t now = state.load(std::memory_order_acquire);
        do {
            if (!(now & OPEN) || now / (2 * OPEN) == seen) return false;
        } while (!state.compare_exchange_weak(now, now + 1));
        seen = now / (2 * OPEN);
        take();
        state.fetch_sub(1, std::memory_order_release);
        return true;
    }

    void work(int index, int cpu) {
        index_of_this_thread = index;
        conducting = index == 1;
        pin(cpu);
        for (uint64_t seen = 0; await(seen);) {
            if (conducting && !lazy) queue.compute();
            help(seen);
        }
    }

    bool called(uint64_t seen) const {
        uint64_t now = state.load();
        return ((now & OPEN) && now / (2 * OPEN) != seen) || (conducting && !lazy && !queue.empty()) || stopping;
    }

    // False when the pool ends.
    bool await(uint64_t seen) {
        auto until = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < 64; ++i) {
                if (called(seen)) return !stopping;
                DSV4_PAUSE();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(sleep);
        sleepers.fetch_add(1);
        std::atomic_thread_fence(std::memory_order_seq_cst);
        bell.wait(lock, [&] { return called(seen); });
        sleepers.fetch_sub(1);
        return !stopping;
    }

    // The reason to wake was stored before, and a sleeper looks for one after it has counted itself: one sees the other.
    void wake() {
        std::atomic_thread_fence(std::memory_order_seq_cst);
        if (sleepers.load() == 0) return;
        std::lock_guard<std::mutex> lock(sleep);
        bell.notify_all();
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

    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    std::vector<int> cpus;
    std::vector<Share> shares;
    const Body* job = nullptr;
    int64_t step = 1;
    uint64_t jobs = 0;
    std::atomic<uint64_t> state{0};
    std::atomic<int> sleepers{0};
    std::atomic<bool> stopping{false}, lazy{false};
    std::mutex sleep;
    std::condition_variable bell;
    std::vector<std::thread> workers;  // last: they use all the others
};

Pool* pool = nullptr;  // never destroyed at exit: a worker must not be joined while the process is torn down
std::mutex callers;    // held by whoever uses the pool

void forget_workers() {  // in a forked child there are none
    pool = nullptr;
    queueing = false;
    tape = nullptr;
}

}  // namespace

int threads() { return pool ? pool->size() : 1; }

int thread_index() { return index_of_this_thread; }

void run_parallel(int64_t count, int64_t grain, const Body& body) {
    std::unique_lock<std::mutex> lock(callers, std::defer_lock);
    if (inside || !pool || (!conducting && !lock.try_lock())) {
        body(0, count);
        return;
    }
    pool->run(count, grain, body);
}

bool queues() { return queueing || tape; }

void* new_call(void (*compute)(void*)) {
    if (tape) return tape->place(compute);
    while (pool->queue.full()) pool->drain();
    return pool->queue.place(compute);
}

void push_call() {
    if (tape) return;
    pool->queue.push();
    pool->announce();
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

DSV4_API void* dsv4_tape_new() { return new dsv4::Tape; }

DSV4_API void dsv4_tape_free(void* tape) { delete static_cast<dsv4::Tape*>(tape); }

// From now on the calling thread's kernels are written to a tape and not computed; null: no longer.
DSV4_API void dsv4_tape_record(void* tape) { dsv4::tape = static_cast<dsv4::Tape*>(tape); }

// Computes what is on a tape, as one kernel that may be queued like others. The tape must live until then.
DSV4_API void dsv4_tape_replay(void* tape) {
    dsv4::submit([=] { static_cast<dsv4::Tape*>(tape)->compute(); });
}

// From now on the calling thread's kernels are queued, until dsv4_end. Returns 0, and changes nothing, when there are no other
// threads or they are busy. lazily: nothing is computed before dsv4_wait, so that tests find what does not live long enough.
DSV4_API int dsv4_begin(int lazily) {
    if (dsv4::queueing || dsv4::inside || !dsv4::callers.try_lock()) return 0;
    if (!dsv4::pool) {
        dsv4::callers.unlock();
        return 0;
    }
    dsv4::queueing = true;
    dsv4::pool->begin(lazily != 0);
    return 1;
}

// Returns when all that the calling thread has queued is computed.
DSV4_API void dsv4_wait() {
    if (dsv4::queueing) dsv4::pool->drain();
}

DSV4_API void dsv4_end() {
    if (!dsv4::queueing) return;
    dsv4::pool->drain();
    dsv4::queueing = false;
    dsv4::callers.unlock();
}
