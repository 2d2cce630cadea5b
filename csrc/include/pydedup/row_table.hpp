// SPDX-License-Identifier: Apache-2.0
// Rows of a stored matrix by number: gather, and sums or maxima of bags of rows. What a table
// learned about its pages (where on a page each block begins, that it is the right block) it keeps,
// so that a call touches little beyond the rows themselves. Pages are never kept.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "pydedup/bags.hpp"
#include "pydedup/page_format.hpp"
#include "pydedup/types.hpp"

namespace pydedup {

enum class BagMode : std::uint8_t { sum, max };

/// Safe between threads.
///
/// take() and bag() work with what they are given and leave out the rest: with all of pages_of(ids)
/// they do everything; with a part of these pages or some blocks at a time, each call does its
/// part. They throw Error{corrupt_page} when a page does not hold what the table says, or not what
/// it held before, and Error{invalid_argument} for ids outside of the matrix.
class RowTable {
  public:
    /// Block b of the grid, row-major, is in slot slots[b] of page page_ids[b]. Where blocks are
    /// deltas, the base of block b is in slot base_slots[b] of page base_page_ids[b], which is
    /// negative for other blocks; where none is, both are empty. Throws Error{invalid_argument}
    /// when there is not one of each for every block.
    RowTable(const BlockGrid& grid, Dtype dtype, std::span<const std::int64_t> page_ids,
             std::span<const std::uint32_t> slots, std::span<const std::int64_t> base_page_ids = {},
             std::span<const std::uint32_t> base_slots = {});
    ~RowTable();
    RowTable(const RowTable&) = delete;
    RowTable& operator=(const RowTable&) = delete;

    [[nodiscard]] const BlockGrid& grid() const noexcept;
    [[nodiscard]] Dtype dtype() const noexcept;

    /// Pages with a piece of these rows, or with the base of one, ascending. Throws
    /// Error{invalid_argument} as above.
    [[nodiscard]] std::vector<std::int64_t> pages_of(std::span<const std::int64_t> ids) const;

    /// Copies row ids[i] into row i of `out`: ids.size() rows of the matrix's width and dtype.
    /// `page_ids` ascend and name `pages`. Encoded blocks are decoded once, up to 16 MiB of them
    /// at a time; what is kept `decoded` of a page (one pointer per page, or none at all) is as in
    /// view_blocks(). Throws Error{invalid_argument} when a delta is here but the page of its base
    /// is not.
    void take(std::span<const std::int64_t> page_ids, std::span<const Page* const> pages,
              std::span<const std::int64_t> ids, std::byte* out, unsigned threads = 0,
              std::span<DecodedBlocks* const> decoded = {}) const;

    /// The same with blocks instead of pages: views[i], with its base if it is a delta, is block
    /// numbers[i] of the grid; no number repeats.
    void take(std::span<const std::int64_t> numbers, std::span<const BlockView> views,
              std::span<const std::int64_t> ids, std::byte* out, unsigned threads = 0) const;

    /// Adds the rows of bag b to row b of `out`, times their weights if there are any, or raises
    /// that row to their maxima (a NaN wins). `out` and what weights are rounded to is
    /// compute_dtype(dtype()). One thread adds up a bag. Throws Error{invalid_argument} for weights
    /// with another mode than sum.
    void bag(std::span<const std::int64_t> page_ids, std::span<const Page* const> pages, Bags& bags,
             BagMode mode, std::byte* out, unsigned threads = 0,
             std::span<DecodedBlocks* const> decoded = {}) const;

    /// The same with blocks, as take() has them. The order in which rows are added up is that of
    /// Bags if the blocks of a call have larger numbers than those of the calls before.
    void bag(std::span<const std::int64_t> numbers, std::span<const BlockView> views, Bags& bags,
             BagMode mode, std::byte* out, unsigned threads = 0) const;

  private:
    class Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace pydedup
