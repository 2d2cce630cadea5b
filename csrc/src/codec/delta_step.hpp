// SPDX-License-Identifier: Apache-2.0
// The step of a quantised delta. Private to codec/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "kernels/codec_kernels.hpp"
#include "pydedup/types.hpp"

namespace pydedup::detail {

/// Elements as the numbers that quantising computes with: f64 of f64, f32 of others.
class Values {
  public:
    /// Of a contiguous array of `dtype`, which is f64, f32, f16 or bf16; it is borrowed where it
    /// can be used as it lies.
    Values(const std::uint8_t* elements, std::size_t count, Dtype dtype);

    [[nodiscard]] const void* data() const noexcept { return data_; }
    [[nodiscard]] std::size_t count() const noexcept { return count_; }
    [[nodiscard]] Dtype dtype() const noexcept { return dtype_; }
    [[nodiscard]] bool wide() const noexcept { return dtype_ == Dtype::f64; }

  private:
    std::unique_ptr<std::uint8_t[]> widened_;
    const void* data_;
    std::size_t count_;
    Dtype dtype_;
};

/// Whether quantising knows the dtype.
[[nodiscard]] bool can_quantise(Dtype dtype) noexcept;

/// base + q * step as elements of the base's dtype, contiguous, as a decoder gives them. `values`
/// has room for as many f64 or f32, which they are rounded from.
void dequantise(const Values& base, const std::uint32_t* z, double step, const CodecKernels& codec,
                void* values, std::uint8_t* elements);

/// The largest step found whose decoded block is within `max_rel_error` * |block| of the block, in
/// Euclidean norm, measured on what decoding gives; z receives the quantised differences. nullopt
/// when there is none: the block or the base is not finite, is 0, or needs too many levels.
[[nodiscard]] std::optional<double> find_step(const Values& block, const Values& base,
                                              double max_rel_error, const CodecKernels& codec,
                                              std::uint32_t* z);

}  // namespace pydedup::detail
