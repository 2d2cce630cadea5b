// SPDX-License-Identifier: Apache-2.0
// Local improvement of pages with blocks of several classes. Private to src/packing.
#pragma once

#include "packing/problem.hpp"

namespace pydedup::packing {

struct Mixed {
    const Problem& problem;
    const Rows& owners;                  // per class
    const std::vector<Index>& class_of;  // per block

    /// Order of the blocks on a page: class by class, then by index.
    [[nodiscard]] bool before(Index a, Index b) const noexcept {
        return class_of[a] != class_of[b] ? class_of[a] < class_of[b] : a < b;
    }
};

/// A page under improvement: its blocks, sorted by Mixed::before().
using PageBlocks = std::vector<Index>;

/// Pages that hold `blocks` in their order, see fill_in_order().
[[nodiscard]] std::vector<PageBlocks> cut_pages(const Mixed& mixed, std::span<const Index> blocks);

/// Sum over pages of the weights of the models that read them.
[[nodiscard]] std::int64_t weighted_reads(const Mixed& mixed, std::span<const PageBlocks> pages);

/// Repacks pairs of pages until no pair gains or the work allowed is done. Never raises
/// weighted_reads() nor the number of pages.
void refine_pairs(const Mixed& mixed, std::vector<PageBlocks>& pages);

/// Goes on where no pair gains: shuffles a few pages, repacks, and keeps what is not worse. For few
/// pages; with many it returns at once. Stops at `least_reads`, which no layout of these blocks
/// goes below (bound.hpp), or after a fixed amount of work: up to about 0.1 s, less where the gap
/// to it is small beside all reads, `other_reads` of other pages included.
void refine_further(const Mixed& mixed, std::vector<PageBlocks>& pages, std::int64_t least_reads,
                    std::int64_t other_reads);

}  // namespace pydedup::packing
