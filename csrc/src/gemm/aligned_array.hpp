// SPDX-License-Identifier: Apache-2.0
// Uninitialised memory at cache-line alignment, for scratch that is written before it is read.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>

#include "pydedup/error.hpp"

namespace pydedup::detail {

inline constexpr std::align_val_t kCacheLine{64};

template <class T>
class AlignedArray {
    static_assert(std::is_trivial_v<T>);

  public:
    AlignedArray() = default;
    explicit AlignedArray(std::size_t count)
        : memory_(count == 0 ? nullptr
                             : static_cast<T*>(::operator new(bytes_of(count), kCacheLine))) {}
    [[nodiscard]] T* data() const noexcept { return memory_.get(); }
    [[nodiscard]] T& operator[](std::size_t i) const noexcept { return memory_.get()[i]; }

  private:
    static std::size_t bytes_of(std::size_t count) {
        if (count > static_cast<std::size_t>(-1) / sizeof(T)) throw std::bad_array_new_length();
        return count * sizeof(T);
    }
    struct Free {
        void operator()(T* memory) const noexcept { ::operator delete(memory, kCacheLine); }
    };
    std::unique_ptr<T, Free> memory_;
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
