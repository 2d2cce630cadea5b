// SPDX-License-Identifier: Apache-2.0
// One stored block as numbers to compute with: checked against the grid, used in place where it can
// be, else decoded and widened into scratch of the calling thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "dispatch/dispatch.hpp"
#include "gemm/aligned_array.hpp"
#include "pydedup/codec.hpp"
#include "pydedup/types.hpp"

namespace pydedup::detail {

/// Throws Error{corrupt_page} unless `block` is block `index` of a matrix with that grid and dtype.
void check_block(const BlockView& block, const BlockGrid& grid, Dtype dtype, std::size_t index);

/// Whether the elements can be read where they lie.
[[nodiscard]] bool is_in_place(const BlockView& block) noexcept;

/// The kernels that compute with T.
template <class T>
[[nodiscard]] const GemmKernelsOf<T>& of_type(const GemmKernels& kernels) noexcept {
    if constexpr (sizeof(T) == 4) {
        return kernels.f32;
    } else {
        return kernels.f64;
    }
}

/// `count` elements of `dtype` at `from` as T, exactly except for 64-bit integers.
template <class T>
void widen(const std::byte* from, Dtype dtype, std::size_t count, T* to,
           const GemmKernels& kernels);

/// Blocks as T, through scratch that lives as long as this object: one per thread.
template <class T>
class WeightReader {
  public:
    explicit WeightReader(const GemmKernels& kernels) : kernels_(kernels) {}

    /// The elements, row-major without gaps, in their stored dtype.
    [[nodiscard]] const std::byte* stored(const BlockView& block) {
        if (is_in_place(block)) return block.data;
        std::byte* const to = bytes_.at_least(block.raw_bytes());
        decode_block(block, to, block.row_bytes());
        return to;
    }

    /// The elements as T, row-major without gaps. Valid until the next call.
    [[nodiscard]] const T* read(const BlockView& block) {
        const std::byte* const from = stored(block);
        if (block.dtype == (sizeof(T) == 4 ? Dtype::f32 : Dtype::f64)) {
            return reinterpret_cast<const T*>(from);
        }
        const std::size_t count = std::size_t{block.rows} * block.cols;
        T* const to = wide_.at_least(count);
        widen(from, block.dtype, count, to, kernels_);
        return to;
    }

    /// Whether as<E>() is where the block lies.
    template <class E>
    [[nodiscard]] static bool is_here(const BlockView& block) noexcept {
        const bool is_same =
            !std::is_same_v<E, T> || block.dtype == (sizeof(T) == 4 ? Dtype::f32 : Dtype::f64);
        return is_same && is_in_place(block);
    }

    /// The elements as E: T, or what has their stored dtype.
    template <class E>
    [[nodiscard]] const E* as(const BlockView& block) {
        if constexpr (std::is_same_v<E, T>) {
            return read(block);
        } else {
            return reinterpret_cast<const E*>(stored(block));
        }
    }

  private:
    const GemmKernels& kernels_;
    Scratch<std::byte> bytes_;
    Scratch<T> wide_;
};

/// Blocks as E (WeightReader::as), the last of which is not decoded again.
template <class T, class E = T>
class LastBlockReader {
  public:
    explicit LastBlockReader(const GemmKernels& kernels) : reader_(kernels) {}

    [[nodiscard]] const E* read(const BlockView& block) {
        if (last_ != block.data) {
            last_ = nullptr;  // should reading fail
            numbers_ = reader_.template as<E>(block);
            last_ = block.data;
        }
        return numbers_;
    }

    /// For when its page may be gone.
    void forget() noexcept { last_ = nullptr; }

  private:
    WeightReader<T> reader_;
    const std::byte* last_ = nullptr;
    const E* numbers_ = nullptr;
};

}  // namespace pydedup::detail
