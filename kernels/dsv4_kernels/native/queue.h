// Kernels that are written down now and computed soon, in order, while Python goes on: its share of a token, a fifth, is
// then hidden behind the others. As on a GPU's stream, memory must stay where it is until the queue has been waited for.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <new>
#include <type_traits>

namespace dsv4 {

// A kernel and its arguments.
struct Call {
    static constexpr uint64_t BYTES = 480;

    void (*compute)(void*);
    alignas(16) char arguments[BYTES];
};

// Calls on their way from the one thread that writes them down to the one that computes them.
class Queue {
public:
    static constexpr uint64_t LENGTH = 1024;

    bool empty() const { return done.load(std::memory_order_acquire) == pushed.load(std::memory_order_acquire); }
    bool full() const { return pushed.load(std::memory_order_relaxed) - done.load(std::memory_order_acquire) == LENGTH; }

    // Where the next call's arguments go; it counts from `push` on.
    void* place(void (*compute)(void*)) {
        Call& call = calls[pushed.load(std::memory_order_relaxed) % LENGTH];
        call.compute = compute;
        return call.arguments;
    }

    void push() { pushed.fetch_add(1); }

    void compute() {
        for (uint64_t number = done.load(std::memory_order_relaxed); number != pushed.load(); ++number) {
            Call& call = calls[number % LENGTH];
            call.compute(call.arguments);
            done.store(number + 1, std::memory_order_release);
        }
    }

private:
    Call calls[LENGTH];
    std::atomic<uint64_t> pushed{0}, done{0};
};

// Calls that are written down once and computed again and again, each time on what their memory then holds.
class Tape {
public:
    void* place(void (*compute)(void*)) {
        calls.emplace_back();
        calls.back().compute = compute;
        return calls.back().arguments;
    }

    void compute() {
        for (Call& call : calls) call.compute(call.arguments);
    }

private:
    std::deque<Call> calls;  // arguments stay where they are
};

// Whether the calling thread's calls are computed later: those of a queue soon, those of a tape whenever it is replayed.
bool queues();
void* new_call(void (*compute)(void*));
void push_call();

// Computes body() now or, where the calling thread queues, later: what it captures is copied, what that points to is not.
template <class F>
void submit(const F& body) {
    if (!queues()) {
        body();
        return;
    }
    static_assert(std::is_trivially_copyable_v<F> && sizeof(F) <= Call::BYTES, "a call is a few numbers and pointers");
    new (new_call([](void* f) { (*static_cast<const F*>(f))(); })) F(body);
    push_call();
}

}  // namespace dsv4
