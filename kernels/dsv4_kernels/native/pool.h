// Threads of our own: one per physical core, the caller being the first. See pool.cpp for how they wait.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace dsv4 {

// A reference to a callable that outlives the call it is passed to: no allocation, unlike std::function.
class Body {
public:
    template <class F>
    Body(F& f) : object(&f), call([](void* o, int64_t begin, int64_t end) { (*static_cast<F*>(o))(begin, end); }) {}
    void operator()(int64_t begin, int64_t end) const { call(object, begin, end); }

private:
    void* object;
    void (*call)(void*, int64_t, int64_t);
};

int threads();

// Which thread of the pool this is: 0 for the caller, below threads().
int thread_index();

void run_parallel(int64_t count, int64_t grain, const Body& body);

// How many items of `each` values a thread takes at once so that it has `work` values to go through; at least one.
inline int64_t items_for(int64_t work, int64_t each) { return std::max<int64_t>(1, work / std::max<int64_t>(1, each)); }

// body(begin, end) over [0, count) in pieces of at most `grain`, taken by whichever thread is free. Returns when all are
// done. A call from within a body, or while another caller has the threads, runs on the calling thread alone.
template <class F>
void parallel(int64_t count, int64_t grain, F&& body) {
    if (count <= grain || threads() == 1) {
        if (count > 0) body(int64_t(0), count);
        return;
    }
    auto& f = body;
    run_parallel(count, grain, Body(f));
}

}  // namespace dsv4
