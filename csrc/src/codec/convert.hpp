// SPDX-License-Identifier: Apache-2.0
// Floats of one dtype as floats of another, the same bits on every machine. Private to codec/.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pydedup/types.hpp"

namespace pydedup::detail {

/// Whether convert_floats() knows both.
[[nodiscard]] bool converts(Dtype from, Dtype to) noexcept;

/// Converts `count` contiguous elements between f64, f32, f16 and bf16, rounding to nearest, ties
/// to even, once. A NaN becomes the quiet NaN of its sign whose other bits are 0; equal dtypes are
/// copied.
void convert_floats(const std::uint8_t* from, Dtype from_dtype, std::size_t count, std::uint8_t* to,
                    Dtype to_dtype) noexcept;

}  // namespace pydedup::detail
