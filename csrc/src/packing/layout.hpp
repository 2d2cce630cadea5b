// SPDX-License-Identifier: Apache-2.0
// Our own packer: pages at the lower bound, then few page reads. Private to src/packing.
#pragma once

#include "packing/problem.hpp"

namespace pydedup::packing {

struct PackedLayout {
    Rows pages;
    bool optimal = false;  // proved: no layout of the new blocks has fewer pages, or as many and
                           // less weighted reads of them
};

/// Pages that hold every new block once. Blocks of equal size: exactly the least number of pages.
/// Otherwise never more than first fit needs for the same order of blocks. Up to 4 million (model,
/// block) pairs, weighted reads are never more than without weights.
[[nodiscard]] PackedLayout pack_layout(const Problem& problem);

}  // namespace pydedup::packing
