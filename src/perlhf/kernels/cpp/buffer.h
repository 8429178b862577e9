// Memory of a kernel.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

struct Buffer {  // floats, not initialised
    explicit Buffer(int64_t size)
        : size(size), at(static_cast<float*>(std::aligned_alloc(64, (size * 4 + 127) / 64 * 64)), &std::free) {}
    void clear() { std::memset(at.get(), 0, size * 4); }
    operator float*() const { return at.get(); }
    int64_t size;
    std::unique_ptr<float, void (*)(void*)> at;
};
