// SPDX-License-Identifier: Apache-2.0
// Differences of which most are 0, as a bit for each and the others behind (docs/format.md,
// "Changed form"): a code for each element takes a bit at least. Private to codec/.
#pragma once

#include <cstddef>
#include <span>

#include "codec/delta_model.hpp"

namespace pydedup::detail {

/// A plane of bytes with its header; none when there are no bytes.
void put_bytes(Sink& sink, std::span<const std::uint8_t> bytes);

/// Reads as many bytes of a plane as there is room for. Returns nullptr, or what is wrong.
[[nodiscard]] const char* get_bytes(Source& source, std::span<std::uint8_t> room);

/// `z` is u32 or u64 of each element.
template <class Wide>
void put_changed(Sink& sink, const Wide* z, std::size_t count);

/// Reads all that is left. Returns nullptr, or what is wrong.
template <class Wide>
[[nodiscard]] const char* get_changed(Source& source, std::size_t count, unsigned value_bits,
                                      Wide* z);

}  // namespace pydedup::detail
