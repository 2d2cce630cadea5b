// SPDX-License-Identifier: Apache-2.0
// A pack request, checked and renumbered: blocks become 0..n-1 in ascending order of their ids, so
// that everything behind this point works on flat arrays. Private to src/packing.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "pydedup/packing.hpp"

namespace pydedup::packing {

using Index = std::uint32_t;  // of a block, model, class or page
inline constexpr Index kNone = std::numeric_limits<Index>::max();

/// Rows of indices in one array.
struct Rows {
    std::vector<std::uint64_t> indptr{0};
    std::vector<Index> items;

    [[nodiscard]] std::size_t size() const noexcept { return indptr.size() - 1; }
    [[nodiscard]] std::span<const Index> row(std::size_t i) const noexcept {
        return {items.data() + indptr[i], static_cast<std::size_t>(indptr[i + 1] - indptr[i])};
    }
    void close_row() { indptr.push_back(items.size()); }
    void append(std::span<const Index> row) {
        items.insert(items.end(), row.begin(), row.end());
        close_row();
    }
};

struct Problem {
    std::vector<std::int64_t> ids;  // ascending; a block's index is its place here
    Rows owned;                     // per model its blocks without a page, ascending
    Rows existing_reads;            // per model the existing pages it reads, ascending
    std::vector<std::int64_t> least_reads;
    std::int64_t lower_bound = 0;
    std::size_t existing_pages = 0;
    bool existing_reads_are_forced = true;  // no owned block is on two existing pages
    std::size_t new_blocks = 0;
    std::vector<std::uint64_t> sizes;   // per block; empty: every block counts 1
    std::uint64_t capacity = 0;         // in the unit of `sizes`
    std::vector<std::int64_t> weights;  // per model >= 1, integers so that sums are exact

    [[nodiscard]] std::size_t models() const noexcept { return owned.size(); }
    [[nodiscard]] std::size_t blocks() const noexcept { return ids.size(); }
    [[nodiscard]] bool unit() const noexcept { return sizes.empty(); }
    [[nodiscard]] std::uint64_t amount(Index block) const noexcept {
        return sizes.empty() ? 1 : sizes[block];
    }
};

/// Throws Error{invalid_argument}.
[[nodiscard]] Problem make_problem(const PackRequest& request);

}  // namespace pydedup::packing
