// SPDX-License-Identifier: Apache-2.0
// Optimal prefix codes of limited length. Private to codec/.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace pydedup::detail {

/// Fills code_bits[s] (0 for bytes that do not occur) with the lengths of an optimal prefix code of
/// at most `limit` bits (8 <= limit <= 15). At least two counts are not 0; their sum is below
/// 2^32, and there are at most 256. Deterministic: ties go to the smaller byte.
void optimal_code_lengths(std::span<const std::uint32_t> counts, unsigned limit,
                          std::array<std::uint8_t, 256>& code_bits) noexcept;

}  // namespace pydedup::detail
