// SPDX-License-Identifier: Apache-2.0
// Uninitialised memory at cache-line alignment, for scratch that is written before it is read.
// Large arrays ask for huge pages: walked in an order of their own, 4 KiB pages cost a TLB miss
// each.
#pragma once

#include <cstddef>
#include <new>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "base/aligned_memory.hpp"
#include "pydedup/error.hpp"

namespace pydedup::detail {

inline constexpr std::size_t kCacheLineBytes = 64;
inline constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

template <class T>
class AlignedArray {
    static_assert(std::is_trivial_v<T>);

  public:
    AlignedArray() = default;
    explicit AlignedArray(std::size_t count) {
        if (count == 0) return;
        if (count > static_cast<std::size_t>(-1) / sizeof(T)) throw std::bad_array_new_length();
        const std::size_t bytes = count * sizeof(T);
        memory_ = aligned_memory(bytes, bytes >= kHugePageBytes ? kHugePageBytes : kCacheLineBytes);
#if defined(MADV_HUGEPAGE)
        if (bytes >= kHugePageBytes) {  // a wish: refused, nothing is lost
            static_cast<void>(
                ::madvise(memory_.get(), bytes / kHugePageBytes * kHugePageBytes, MADV_HUGEPAGE));
        }
#endif
    }
    [[nodiscard]] T* data() const noexcept { return static_cast<T*>(memory_.get()); }
    [[nodiscard]] T& operator[](std::size_t i) const noexcept { return data()[i]; }

  private:
    AlignedMemory memory_;
};

/// Grows on demand and keeps what it has; contents do not survive growing.
template <class T>
class Scratch {
  public:
    [[nodiscard]] T* at_least(std::size_t count) {
        if (count > count_) {
            array_ = AlignedArray<T>(count);
            count_ = count;
        }
        return array_.data();
    }

  private:
    AlignedArray<T> array_;
    std::size_t count_ = 0;
};

}  // namespace pydedup::detail
