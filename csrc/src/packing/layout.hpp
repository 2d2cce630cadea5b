// SPDX-License-Identifier: Apache-2.0
// Our own packer: pages at the lower bound, then few page reads. Private to src/packing.
#pragma once

#include "packing/problem.hpp"

namespace pydedup::packing {

/// Pages that hold every new block once. Blocks of equal size: exactly the least number of pages.
/// Otherwise never more than first fit needs for the same order of blocks.
[[nodiscard]] Rows pack_layout(const Problem& problem);

}  // namespace pydedup::packing
