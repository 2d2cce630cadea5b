// SPDX-License-Identifier: Apache-2.0
// Page packing: which distinct block goes on which page. Pure functions of their arguments: the
// same request gives the same layout on every machine. Thread-safe; one call uses one thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace pydedup {

/// Rows of block ids in one array: row i is ids[indptr[i] .. indptr[i + 1]).
struct IdRows {
    std::span<const std::int64_t> indptr;
    std::span<const std::int64_t> ids;
};

enum class PackAlgorithm : std::uint8_t {
    layout,     ///< fewest pages, then fewest weighted page reads; every block is stored once
    two_stage,  ///< exact cover: full pages of each equivalence class, greedy2 on what is left
    greedy1,    ///< exact cover: each equivalence class by itself
    greedy2,    ///< exact cover: models from large to small, blocks by number of sharers
    baseline,   ///< exact cover: models in the order given
};

/// Whether `algorithm` promises that the new blocks of a model are exactly the union of the new
/// pages it reads. These algorithms may store a block on several pages.
[[nodiscard]] constexpr bool promises_exact_cover(PackAlgorithm algorithm) noexcept {
    return algorithm != PackAlgorithm::layout;
}

struct PackRequest {
    IdRows owners;           ///< per model its distinct block ids (>= 0), in any order
    std::uint64_t capacity;  ///< of a page: blocks, or bytes when `sizes` is given
    std::span<const std::int64_t> sizes = {};  ///< bytes of the distinct ids in ascending order
    IdRows existing = {};                      ///< pages already stored; ids nobody owns may occur
    std::span<const double> weights = {};      ///< per model >= 0, e.g. call rates; empty: equal
    PackAlgorithm algorithm = PackAlgorithm::layout;
};

/// Page numbers count the existing pages first, then the new ones.
struct PackResult {
    std::vector<std::int64_t> page_indptr;  ///< rows of the new pages
    std::vector<std::int64_t> page_ids;
    std::vector<std::int64_t> read_indptr;  ///< rows per model
    std::vector<std::int64_t> read_pages;   ///< the pages that a model reads, ascending
    std::vector<std::int64_t> least_reads;  ///< per model, the bound on pages for it alone
    std::int64_t lower_bound;  ///< no layout has fewer pages, the existing ones included
    bool optimal = false;  ///< proved, for `layout`: no fewer pages, nor with as many fewer reads
};

/// Packs the blocks that are on no existing page into new pages. Near-linear in the number of
/// (model, block) pairs. Throws Error{invalid_argument} when ids are negative or repeat within a
/// row, rows are malformed, a block is larger than a page, or sizes or weights do not fit.
[[nodiscard]] PackResult pack_pages(const PackRequest& request);

/// What check_layout() proves a layout against.
struct LayoutClaim {
    IdRows pages;  ///< the new pages
    IdRows reads;  ///< per model the page numbers it reads, as in PackResult
};

/// Proves that `claim` answers `request`, sharing no code with the packers: pages within capacity,
/// no foreign or repeated block on a page, no block stored again that an existing page has, every
/// block of a model on a page that the model reads, no page read in vain; every block stored once
/// for `layout`, exact cover for the other algorithms.
/// Throws Error{invalid_argument} with the first violation.
void check_layout(const PackRequest& request, const LayoutClaim& claim);

}  // namespace pydedup
