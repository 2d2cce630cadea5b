// SPDX-License-Identifier: Apache-2.0
// Memory at an alignment, cut here out of what the ordinary operator new gives. glibc before 2.38
// cuts what an aligned one is to give out of a larger piece and frees the rest: once something
// small lies there, the memory of an array does not do for the next one of the same size, and a
// process grows by each.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#endif

namespace pydedup::detail {

class AlignedFree {
  public:
    AlignedFree() = default;
    explicit AlignedFree(void* whole) noexcept : whole_(whole) {}
    void operator()(void* /*at*/) const noexcept { ::operator delete(whole_); }

  private:
    void* whole_ = nullptr;
};

using AlignedMemory = std::unique_ptr<void, AlignedFree>;

/// Uninitialised bytes that begin at a multiple of `alignment`, which is a power of two.
[[nodiscard]] inline AlignedMemory aligned_memory(std::size_t bytes, std::size_t alignment) {
    std::size_t space = bytes + alignment;
    if (space < bytes) throw std::bad_alloc();
    void* const whole = ::operator new(space);
    void* at = whole;
    std::align(alignment, bytes, at, space);
#if defined(ASAN_POISON_MEMORY_REGION)  // what is behind it belongs to nobody
    ASAN_POISON_MEMORY_REGION(static_cast<std::byte*>(at) + bytes, space - bytes);
#endif
    return {at, AlignedFree(whole)};
}

}  // namespace pydedup::detail
