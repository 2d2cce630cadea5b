// SPDX-License-Identifier: Apache-2.0
#include "codec/delta_changed.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "base/endian.hpp"
#include "base/rounding.hpp"
#include "codec/plane.hpp"
#include "dispatch/dispatch.hpp"

namespace pydedup::detail {
namespace {

// In the byte of a difference: the rest of it follows behind.
constexpr std::uint8_t kLarge = 255;

}  // namespace

void put_bytes(Sink& sink, std::span<const std::uint8_t> bytes) {
    if (bytes.empty()) return;
    PlanePlan plan;
    plan_plane(bytes, plan);
    const std::size_t at = sink.size();
    sink.resize(at + kPlaneHeaderBytes + plan.length);
    put_plane_header(plan, sink.data() + at);
    put_plane(bytes, plan, std::span(sink).subspan(at + kPlaneHeaderBytes));
}

const char* get_bytes(Source& source, std::span<std::uint8_t> room) {
    if (room.empty()) return nullptr;
    const std::span<const std::uint8_t> head = source.take(kPlaneHeaderBytes);
    if (source.failed) return "a plane is cut off";
    ReadPlane plane;
    const std::uint8_t* const end = source.left.data() + source.left.size();
    if (const char* wrong =
            get_plane(head.data(), source.left, end, kernels().codec, room, plane)) {
        return wrong;
    }
    if (plane.bytes != room.data()) std::copy_n(plane.bytes, room.size(), room.data());
    static_cast<void>(source.take(plane.length));
    return nullptr;
}

template <class Wide>
void put_changed(Sink& sink, const Wide* z, std::size_t count) {
    std::vector<std::uint8_t> bits(ceil_div(count, 8));
    std::vector<std::uint8_t> small;
    Sink large;
    for (std::size_t i = 0; i < count; ++i) {
        if (z[i] == 0) continue;
        bits[i / 8] = static_cast<std::uint8_t>(bits[i / 8] | 1U << (i % 8));
        const Wide above = z[i] - 1;
        small.push_back(static_cast<std::uint8_t>(std::min<Wide>(above, kLarge)));
        if (above >= kLarge) put_varint(large, above - kLarge);
    }
    put_bytes(sink, bits);
    put_bytes(sink, small);
    sink.insert(sink.end(), large.begin(), large.end());
}

template <class Wide>
const char* get_changed(Source& source, std::size_t count, unsigned value_bits, Wide* z) {
    // Looked at in words: of a byte, nobody foresees how many bits are set.
    std::vector<std::uint8_t> bits(round_up(ceil_div(count, 8), sizeof(std::uint64_t)));
    const std::span<std::uint8_t> used(bits.data(), ceil_div(count, 8));
    if (const char* wrong = get_bytes(source, used)) return wrong;
    if (count % 8 != 0 && used.back() >> (count % 8) != 0) return "its bits end with stray ones";
    const auto word_at = [&](std::size_t at) {
        return load_le<std::uint64_t>(reinterpret_cast<const std::byte*>(&bits[at]));
    };
    std::size_t n_changed = 0;
    for (std::size_t at = 0; at < bits.size(); at += sizeof(std::uint64_t)) {
        n_changed += static_cast<std::size_t>(std::popcount(word_at(at)));
    }
    std::vector<std::uint32_t> changed(n_changed);
    auto next = changed.begin();
    for (std::size_t at = 0; at < bits.size(); at += sizeof(std::uint64_t)) {
        for (std::uint64_t left = word_at(at); left != 0; left &= left - 1) {
            const auto bit = static_cast<std::size_t>(std::countr_zero(left));
            *next++ = static_cast<std::uint32_t>(8 * at + bit);
        }
    }
    std::vector<std::uint8_t> small(changed.size());
    if (const char* wrong = get_bytes(source, small)) return wrong;
    const std::uint64_t most = value_bits < 64 ? (std::uint64_t{1} << value_bits) - 1 : UINT64_MAX;
    std::fill_n(z, count, Wide{0});
    for (std::size_t i = 0; i < changed.size(); ++i) {
        std::uint64_t above = small[i];
        if (above == kLarge) {
            const std::uint64_t rest = source.varint();
            if (source.failed) return "its large differences are cut off";
            if (rest > most - 1 - kLarge) return "a change has an impossible value";
            above += rest;
        }
        if (above >= most) return "a change has an impossible value";
        z[changed[i]] = static_cast<Wide>(above + 1);
    }
    return source.left.empty() ? nullptr : "bytes are left over";
}

template void put_changed(Sink&, const std::uint32_t*, std::size_t);
template void put_changed(Sink&, const std::uint64_t*, std::size_t);
template const char* get_changed(Source&, std::size_t, unsigned, std::uint32_t*);
template const char* get_changed(Source&, std::size_t, unsigned, std::uint64_t*);

}  // namespace pydedup::detail
