// SPDX-License-Identifier: Apache-2.0
// What no layout can go below. Private to src/packing.
#pragma once

#include "packing/problem.hpp"

namespace pydedup::packing {

/// Pieces with owner sets, whatever pages they are put on: no layout has less weighted reads.
///
/// Call a family of model sets F closed upwards when a set in F stays in F with one model more.
/// The pages whose readers are in F hold all blocks whose owners are in F, so there are at least
/// ceil(amount of these / capacity) of them. The weight of a page's readers is a sum of such
/// families: cut the models into groups, and within each group into "weighs at least t" for every
/// t. Every way to cut gives a bound. Up to eight models all ways are tried; more are taken eight
/// by eight, and all together in one group.
[[nodiscard]] std::int64_t least_weighted_reads(const Problem& problem, const Rows& owners,
                                                std::span<const std::uint64_t> amount);

/// Bound L2 of bin packing (Martello and Toth, "Lower bounds and reduction procedures for the bin
/// packing problem", Discrete Applied Mathematics 28, 1990): pages for `sizes` (1 to `capacity`
/// each, reordered), at least ceil(sum / capacity) and more where large blocks leave room that no
/// small one can fill. O(n log n) when a block is larger than half a page, else O(n).
[[nodiscard]] std::uint64_t least_pages(std::span<std::uint64_t> sizes, std::uint64_t capacity);

}  // namespace pydedup::packing
