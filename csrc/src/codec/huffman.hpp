// SPDX-License-Identifier: Apache-2.0
// Canonical, length-limited Huffman coding of one byte plane in four streams. Private to codec/.
// The payload is described in docs/format.md, "Block encodings".
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/codec_kernels.hpp"

namespace pydedup::detail {

/// How often each byte occurs in each of the four segments of a plane (segment = one stream).
struct PlaneHistogram {
    std::array<std::array<std::uint32_t, 256>, 4> segment;
    std::array<std::uint32_t, 256> total;
    unsigned n_used;  ///< different bytes
};

void count_bytes(std::span<const std::uint8_t> plane, PlaneHistogram& histogram) noexcept;

/// A code for the bytes of a plane, and what the plane will take with it, to the byte.
struct HuffmanPlan {
    std::array<std::uint8_t, 256> code_bits;  ///< 0 = not used
    std::array<std::uint32_t, 4> stream_bytes;
    std::uint64_t payload_bytes;  ///< table and streams
};

/// Whether no Huffman code can make the plane smaller than it is. A proof, not a guess: no code
/// beats the Shannon entropy, which is at least the collision entropy, a sum of squares.
[[nodiscard]] bool is_incompressible(const PlaneHistogram& histogram, std::uint64_t count) noexcept;

/// The best code of at most kMaxCodeBits bits; needs two different bytes or more.
void plan_huffman(const PlaneHistogram& histogram, HuffmanPlan& plan) noexcept;

/// Writes plan.payload_bytes bytes at `out`; room.size() >= that.
void huffman_encode(std::span<const std::uint8_t> plane, const HuffmanPlan& plan,
                    std::span<std::uint8_t> room) noexcept;

/// Decodes `plane.size()` bytes. Returns nullptr, or what is wrong with the payload.
[[nodiscard]] const char* huffman_decode(std::span<const std::uint8_t> payload,
                                         const std::uint8_t* readable_end,
                                         const CodecKernels& codec,
                                         std::span<std::uint8_t> plane) noexcept;

}  // namespace pydedup::detail
