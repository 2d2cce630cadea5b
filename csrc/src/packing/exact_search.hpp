// SPDX-License-Identifier: Apache-2.0
// Best layouts of few blocks, by trying all placements that could be better. Private to
// src/packing.
#pragma once

#include "packing/refine.hpp"

namespace pydedup::packing {

/// Up to so many blocks search_exactly() is worth a try: most of such problems end within its
/// budget.
inline constexpr std::size_t kFewBlocks = 32;

/// Replaces `pages` by a layout of the same blocks with fewer pages (`least_pages` at least), or
/// as many and less weighted reads (`least_reads` at least), if there is one. True when that is
/// proved to be the best there is; false when the search was given up after a fixed amount of work
/// (about 10 ms), or not begun: more than kFewBlocks blocks, or owners of more than 64 models.
[[nodiscard]] bool search_exactly(const Mixed& mixed, std::vector<PageBlocks>& pages,
                                  std::size_t least_pages, std::int64_t least_reads);

}  // namespace pydedup::packing
