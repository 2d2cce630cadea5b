// SPDX-License-Identifier: Apache-2.0
// Pages: the unit of storage and I/O (docs/format.md, "Page"). A page is built once and never
// changes; a parsed page is immutable and safe between threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "pydedup/codec.hpp"
#include "pydedup/types.hpp"

namespace pydedup {

class DecodedBlocks;  // pydedup/decoded.hpp

/// The newest version that is read. Pages are written with the oldest one that can describe them.
inline constexpr std::uint16_t kPageVersion = 2;
/// From this version on, pages hold deltas, and every page of it does.
inline constexpr std::uint16_t kDeltaPageVersion = 2;
inline constexpr std::size_t kPageHeaderBytes = 64;
inline constexpr std::size_t kSlotBytes = 32;
inline constexpr std::size_t kBlockAlignment = 64;

/// Bytes of the page that holds these blocks in this order.
[[nodiscard]] std::size_t page_bytes(std::span<const BlockView> blocks);

/// Writes the page that holds these blocks, in this order, one per slot. `out.size()` is
/// page_bytes(blocks). Throws Error{invalid_argument} for blocks that a page cannot describe.
void build_page(std::span<const BlockView> blocks, std::span<std::byte> out);

/// A page in somebody else's memory. parse() checks everything that can be checked without decoding
/// a block, so that block() can be trusted: header, slot table, bounds, order, codes and checksum.
class PageView {
  public:
    PageView() = default;

    /// Throws Error{corrupt_page} with what is wrong and where, Error{unsupported_format} for a
    /// page of a newer version. `verify_checksum` false is for bytes that were verified before.
    [[nodiscard]] static PageView parse(Bytes page, bool verify_checksum = true);

    [[nodiscard]] Bytes bytes() const noexcept { return bytes_; }
    [[nodiscard]] std::size_t n_slots() const noexcept { return n_slots_; }
    [[nodiscard]] Digest checksum() const noexcept;

    /// Throws Error{corrupt_page} for a slot that the page does not have: it comes from a block
    /// map.
    [[nodiscard]] BlockView block(std::size_t slot) const;

    /// Byte offset of a slot's block in the page.
    [[nodiscard]] std::size_t offset(std::size_t slot) const;

  private:
    Bytes bytes_;
    std::size_t n_slots_ = 0;
};

/// A page with its memory: whoever holds a copy keeps the bytes alive. `owner` may have any
/// deleter, for instance one that gives a Python object back.
class Page {
  public:
    /// Parses `size` bytes at `owner`; throws as PageView::parse does.
    Page(std::shared_ptr<const std::byte> owner, std::size_t size, bool verify_checksum = true);

    [[nodiscard]] const PageView& view() const noexcept { return view_; }
    [[nodiscard]] const std::shared_ptr<const std::byte>& owner() const noexcept { return owner_; }
    [[nodiscard]] BlockView block(std::size_t slot) const { return view_.block(slot); }
    [[nodiscard]] std::size_t n_slots() const noexcept { return view_.n_slots(); }
    [[nodiscard]] std::size_t nbytes() const noexcept { return view_.bytes().size(); }
    [[nodiscard]] Digest checksum() const noexcept { return view_.checksum(); }
    /// Different for each page that this process ever made, copies apart; never 0. So whoever
    /// remembers what a page holds can tell that it is still the same.
    [[nodiscard]] std::uint64_t serial() const noexcept { return serial_; }

  private:
    std::shared_ptr<const std::byte> owner_;
    PageView view_;
    std::uint64_t serial_;
};

/// Where a block of a matrix is stored: `pages[page]`, slot `slot`.
struct StoredBlock {
    std::uint32_t page;
    std::uint32_t slot;
};

/// The page of a block that has no base.
inline constexpr std::uint32_t kNoPage = UINT32_MAX;

/// The bases of stored blocks: that of block i is bases[i], `page` counting in `pages`; kNoPage for
/// blocks that are no deltas. No `bases` at all: so are all.
struct StoredBases {
    std::span<const Page* const> pages;
    std::span<const StoredBlock> bases;
};

/// `block`, which is block i of those that `bases` are given for, with its base when it is a delta
/// that has one: kept in `base`, which must outlive the result. Throws Error{invalid_argument} for
/// a base on a page that is not there (nullptr), Error{corrupt_page} for a slot that its page does
/// not have.
[[nodiscard]] BlockView with_base(BlockView block, const StoredBases& bases, std::size_t i,
                                  BlockView& base);

/// views[i] = the block at pages[page_index[i]], slots[i]; all three of one length. Throws
/// Error{invalid_argument} for an index outside pages, Error{corrupt_page} for a slot that its page
/// does not have.
///
/// Where `decoded` has something for a page (one pointer per page, or none at all), encoded blocks
/// that are kept there are seen as raw ones, and others are kept once they are decoded.
void view_blocks(std::span<const Page* const> pages, std::span<const std::uint32_t> page_index,
                 std::span<const std::uint32_t> slots, std::span<BlockView> views,
                 unsigned threads = 0, std::span<DecodedBlocks* const> decoded = {});

/// Decodes stored[i] into block indices[i] of the matrix at `out`, whose shape is that of the grid.
/// Throws Error{corrupt_page} when a slot has another dtype or shape than the block, and for a
/// delta whose base is kNoPage, a delta itself, or another block than it was made from;
/// Error{invalid_argument} for an index outside grid or pages.
void read_blocks(std::span<const Page* const> pages, std::span<const StoredBlock> stored,
                 const StoredBases& bases, std::span<const std::int64_t> indices,
                 const BlockGrid& grid, Dtype dtype, std::byte* out, std::size_t out_stride_bytes,
                 unsigned threads = 0);

/// equal[i] = whether stored[i] holds the very bytes of block indices[i], dtype and shape included.
/// Raw blocks are compared where they lie.
void blocks_equal(std::span<const Page* const> pages, std::span<const StoredBlock> stored,
                  const StoredBases& bases, std::span<const std::int64_t> indices,
                  const MatrixRef& matrix, const BlockGrid& grid, std::span<bool> equal,
                  unsigned threads = 0);

}  // namespace pydedup
