// SPDX-License-Identifier: Apache-2.0
// Planes to bytes and back. Sizes are known from histograms before a byte is encoded.
#include "codec/plane.hpp"

#include <cstring>

#include "base/endian.hpp"
#include "base/rounding.hpp"
#include "pydedup/codec.hpp"

namespace pydedup::detail {

std::size_t worth_it(std::size_t raw) noexcept { return raw - ceil_div(raw, kMinPlaneSaving); }

void plan_plane(std::span<const std::uint8_t> plane, PlanePlan& plan) noexcept {
    PlaneHistogram histogram;
    count_bytes(plane, histogram);
    plan.value = 0;
    if (histogram.n_used == 1) {
        plan.kind = PlaneKind::constant;
        plan.value = plane[0];
        plan.length = 0;
        return;
    }
    plan.kind = PlaneKind::raw;
    plan.length = static_cast<std::uint32_t>(plane.size());
    if (is_incompressible(histogram, plane.size())) return;
    plan_huffman(histogram, plan.huffman);
    if (plan.huffman.payload_bytes <= worth_it(plane.size())) {
        plan.kind = PlaneKind::huffman;
        plan.length = static_cast<std::uint32_t>(plan.huffman.payload_bytes);
    }
}

void put_plane_header(const PlanePlan& plan, std::uint8_t* head) noexcept {
    auto* const to = reinterpret_cast<std::byte*>(head);
    to[0] = static_cast<std::byte>(plan.kind);
    to[1] = static_cast<std::byte>(plan.value);
    store_le(to + 2, std::uint16_t{0});
    store_le(to + 4, plan.length);
}

void put_plane(std::span<const std::uint8_t> plane, const PlanePlan& plan,
               std::span<std::uint8_t> room) noexcept {
    if (plan.kind == PlaneKind::raw) {
        std::memcpy(room.data(), plane.data(), plane.size());
    } else if (plan.kind == PlaneKind::huffman) {
        huffman_encode(plane, plan.huffman, room);
    }
}

const char* get_plane(const std::uint8_t* head, std::span<const std::uint8_t> rest,
                      const std::uint8_t* readable_end, const CodecKernels& codec,
                      std::span<std::uint8_t> room, ReadPlane& plane) noexcept {
    const auto* const from = reinterpret_cast<const std::byte*>(head);
    const auto kind = static_cast<PlaneKind>(head[0]);
    plane.length = load_le<std::uint32_t>(from + 4);
    plane.bytes = room.data();
    if (load_le<std::uint16_t>(from + 2) != 0) return "reserved bytes are not 0";
    if (kind != PlaneKind::constant && head[1] != 0) {
        return "a plane that is not constant names a value";
    }
    if (plane.length > rest.size()) return "a plane is longer than the block";
    if (kind == PlaneKind::raw && plane.length == room.size()) {
        plane.bytes = rest.data();
        return nullptr;
    }
    if (kind == PlaneKind::constant && plane.length == 0) {
        std::memset(room.data(), head[1], room.size());
        return nullptr;
    }
    if (kind == PlaneKind::huffman) {
        return huffman_decode(rest.first(plane.length), readable_end, codec, room);
    }
    return "a plane has an unknown kind or a wrong length";
}

}  // namespace pydedup::detail
