// SPDX-License-Identifier: Apache-2.0
// One plane of bytes: a header of 8 bytes, and a payload that is raw, constant or Huffman-coded
// (docs/format.md, "planes"). Private to codec/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "codec/huffman.hpp"
#include "kernels/codec_kernels.hpp"

namespace pydedup::detail {

inline constexpr std::size_t kPlaneHeaderBytes = 8;

enum class PlaneKind : std::uint8_t { raw = 0, constant = 1, huffman = 2 };

/// How a plane will be written, and how long its payload will be.
struct PlanePlan {
    PlaneKind kind;
    std::uint8_t value;  ///< of a constant plane
    std::uint32_t length;
    HuffmanPlan huffman;
};

/// The most bytes that may stand in for `raw` ones.
[[nodiscard]] std::size_t worth_it(std::size_t raw) noexcept;

void plan_plane(std::span<const std::uint8_t> plane, PlanePlan& plan) noexcept;

void put_plane_header(const PlanePlan& plan, std::uint8_t* head) noexcept;

/// Writes plan.length bytes at `room`, which has as many or more.
void put_plane(std::span<const std::uint8_t> plane, const PlanePlan& plan,
               std::span<std::uint8_t> room) noexcept;

/// What a header says comes next, and where the plane is once that was read.
struct ReadPlane {
    std::size_t length = 0;               ///< of the payload
    const std::uint8_t* bytes = nullptr;  ///< in the payload, or in the room for it
};

/// Reads a plane of `room.size()` bytes whose payload begins at `rest`. Returns nullptr, or what is
/// wrong. No byte is read from `readable_end` on.
[[nodiscard]] const char* get_plane(const std::uint8_t* head, std::span<const std::uint8_t> rest,
                                    const std::uint8_t* readable_end, const CodecKernels& codec,
                                    std::span<std::uint8_t> room, ReadPlane& plane) noexcept;

}  // namespace pydedup::detail
