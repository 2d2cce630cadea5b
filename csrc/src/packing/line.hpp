// SPDX-License-Identifier: Apache-2.0
// Orders pieces with owner sets on a line, so that a cut into pages leaves each model on few of
// them. Private to src/packing.
#pragma once

#include "packing/problem.hpp"

namespace pydedup::packing {

/// What is put on the line: equivalence classes, or what is left of them.
struct Pieces {
    const Rows& owners;                     // per piece, models ascending
    std::span<const std::uint64_t> amount;  // per piece, in the unit of the capacity
    std::span<const std::int64_t> weights;  // per model
    std::uint64_t capacity;
};

/// Gray-code order of the owner sets: the pieces of the heaviest model form one run, those of the
/// next at most two that touch, and so on. O(n log n).
[[nodiscard]] std::vector<Index> gray_line(const Pieces& pieces);

/// Fills page after page; the next piece is the one that adds the least weight of models which do
/// not read the page yet. `line` decides between equals, and when the work would exceed about
/// `most_visits` (piece, owner) visits, only its nearer part is looked at.
[[nodiscard]] std::vector<Index> gather_line(const Pieces& pieces, std::span<const Index> line,
                                             std::uint64_t most_visits);

/// Fills page after page; the next piece is the one whose owners are most like the page's models
/// (weighted Jaccard similarity). O(n * owner pairs): for small n only.
[[nodiscard]] std::vector<Index> similar_line(const Pieces& pieces);

/// Pieces from much to little weight of their owners, then by `line`.
[[nodiscard]] std::vector<Index> heavy_line(const Pieces& pieces, std::span<const Index> line);

}  // namespace pydedup::packing
