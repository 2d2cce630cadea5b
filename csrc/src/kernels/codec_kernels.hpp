// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/delta_kernels.hpp"

namespace pydedup {

/// Longest Huffman code, so that a decoding table of 16-bit entries stays in 4 KiB.
inline constexpr unsigned kMaxCodeBits = 11;

/// Four bit streams of one Huffman-coded plane of `count` symbols. Stream j holds the symbols from
/// j * s on, s = ceil(count / 4), most significant bit first.
struct HuffmanStreams {
    const std::uint8_t* begin[4];
    /// No byte from here on is read. Streams may run into each other, never past this.
    const std::uint8_t* end;
    /// Indexed by the next `table_bits` bits: symbol << 8 | code bits (1 .. table_bits).
    const std::uint16_t* table;
    unsigned table_bits;
};

struct CodecKernels {
    /// planes[p * rows * cols + i] = byte p of element i, row-major. With `rotate` (floats) the
    /// element is first rotated left by one bit, so that the exponent is a byte of its own in f32
    /// and bf16. `item_bytes` is 1, 2, 4 or 8. Rows of `elements` lie `stride` bytes apart.
    void (*split_planes)(const std::uint8_t* elements, std::size_t stride, std::size_t rows,
                         std::size_t cols, std::size_t item_bytes, bool rotate,
                         std::uint8_t* planes) noexcept;
    /// The inverse; planes lie where `planes[p]` says, so that a plane can be read where it is.
    void (*merge_planes)(const std::uint8_t* const* planes, std::size_t rows, std::size_t cols,
                         std::size_t item_bytes, bool rotate, std::uint8_t* elements,
                         std::size_t stride) noexcept;
    /// Writes `count` symbols; consumed[j] = bits that stream j took. Never fails: bits behind
    /// `end` read as 0, and the caller judges by `consumed`.
    void (*huffman_decode)(const HuffmanStreams& streams, std::size_t count, std::uint8_t* out,
                           std::uint64_t* consumed) noexcept;
    DeltaKernels delta;
};

}  // namespace pydedup
