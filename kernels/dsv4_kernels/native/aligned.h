// Memory that begins with a line of the cache: a vector that lies across two lines takes two loads.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace dsv4 {

template <class T>
struct OnLines {
    using value_type = T;

    OnLines() = default;
    template <class U>
    OnLines(const OnLines<U>&) {}

    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const OnLines&) const { return true; }
    bool operator!=(const OnLines&) const { return false; }
};

template <class T>
using Aligned = std::vector<T, OnLines<T>>;

}  // namespace dsv4
