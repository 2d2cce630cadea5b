// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace pydedup {

struct CodecKernels {
    /// planes[p*count + i] = byte p of element i; for floats (rotate) the element is first rotated
    /// left by one bit, so that the exponent is a byte of its own in f32 and bf16.
    void (*split_planes)(const std::uint8_t* elements, std::size_t count, std::size_t item_bytes,
                         bool rotate, std::uint8_t* planes) noexcept;
    /// The inverse of split_planes.
    void (*merge_planes)(const std::uint8_t* planes, std::size_t count, std::size_t item_bytes,
                         bool rotate, std::uint8_t* elements) noexcept;
};

}  // namespace pydedup
