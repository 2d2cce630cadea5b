// SPDX-License-Identifier: Apache-2.0
// Equivalence classes: blocks with the same owner set. Private to src/packing.
#pragma once

#include "packing/problem.hpp"

namespace pydedup::packing {

struct Classes {
    Rows members;  // per class its blocks, ascending; classes in order of their first block
    Rows owners;   // per class the models that own it, ascending

    [[nodiscard]] std::size_t size() const noexcept { return members.size(); }
};

/// Groups the blocks of `owned` by owner set, by partition refinement: exact without comparing
/// sets, and linear in the number of (model, block) pairs.
[[nodiscard]] Classes find_classes(const Rows& owned, std::size_t blocks);

}  // namespace pydedup::packing
