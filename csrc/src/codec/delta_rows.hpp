// SPDX-License-Identifier: Apache-2.0
// Rows of a block that are coded alike, and what a code costs. Private to codec/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/counting.hpp"
#include "codec/delta_plan.hpp"

namespace pydedup::detail {

inline constexpr std::size_t kMaxExactGroups = 3;

using Histogram = std::vector<std::uint32_t>;  ///< [context * 256 + symbol]

/// Bits of coding what was counted, without the code itself, which takes `table_bits` more.
std::uint64_t cost_of(const std::uint32_t* counts, unsigned n_symbols, std::uint64_t& table_bits);

/// Both together.
std::uint64_t full_cost(const std::uint32_t* counts, unsigned n_symbols);

/// Puts what was counted at [row * n_symbols + symbol] where a histogram has it.
void put_counts(const Counts<4>& counts, unsigned n_symbols, Histogram& histogram);

/// Returns the number of groups, and the group of each row. The histogram is that of the groups.
unsigned group_rows(const Differences& differences, RowScore score, const Alphabet& alphabet,
                    const std::uint8_t* symbols, std::vector<std::uint8_t>& group_of_row,
                    Histogram& histogram);

}  // namespace pydedup::detail
