// SPDX-License-Identifier: Apache-2.0
// Which stored pages a model reads for the blocks that have one already. Private to src/packing.
#pragma once

#include "packing/problem.hpp"

namespace pydedup::packing {

/// Per model the pages it reads so that all of its blocks that are on a page are read; few pages
/// where blocks lie on several (greedy cover), ties to the lower page number.
[[nodiscard]] Rows choose_existing(const Rows& owned, const Rows& pages, std::size_t blocks);

}  // namespace pydedup::packing
