// SPDX-License-Identifier: Apache-2.0
// Cutting a sequence of blocks into pages. Private to src/packing.
#pragma once

#include "packing/problem.hpp"

namespace pydedup::packing {

/// Appends pages that hold `sequence` in its order. Blocks of equal size fill every page but the
/// last. Otherwise, where the next block does not fit, the largest of the next few that does goes
/// first: blocks move a little, and only towards the front.
void fill_in_order(const Problem& problem, std::span<const Index> sequence, Rows& pages);

/// Makes `pages` those of fill_in_order(). Returns how many count as full: all, or all but the
/// last.
[[nodiscard]] std::size_t fill_anew(const Problem& problem, std::span<const Index> sequence,
                                    Rows& pages);

/// Appends pages that hold `sequence`, each block on the first page with room for it. Fewer pages
/// than fill_in_order() where large and small blocks lie far apart, at the price of its order.
void fill_first_fit(const Problem& problem, std::span<const Index> sequence, Rows& pages);

}  // namespace pydedup::packing
