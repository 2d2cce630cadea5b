// SPDX-License-Identifier: Apache-2.0
// Where the blocks of a stored matrix lie: which are on which page, and where on it, as far as a
// page has been seen. What a RowTable (row_table.cpp) gathers by. Private to storage/.
//
// What is learned of a page is kept per block: the offset of its first byte. Pages are immutable,
// so it stays true; a page's serial says that it is still the same one in memory, and when it comes
// anew its checksum says that it is the same as before.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "pydedup/codec.hpp"
#include "pydedup/decoded.hpp"
#include "pydedup/page_format.hpp"
#include "pydedup/types.hpp"

namespace pydedup::detail {

/// Safe between threads. What it throws, pydedup/row_table.hpp says.
class RowPlaces {
  public:
    RowPlaces(const BlockGrid& grid, Dtype dtype, std::span<const std::int64_t> page_ids,
              std::span<const std::uint32_t> slots, std::span<const std::int64_t> base_page_ids,
              std::span<const std::uint32_t> base_slots);

    [[nodiscard]] const BlockGrid& grid() const noexcept { return grid_; }
    [[nodiscard]] Dtype dtype() const noexcept { return dtype_; }

    [[nodiscard]] std::vector<std::int64_t> pages_of(std::span<const std::int64_t> ids) const;

  protected:
    /// The pages of one call by number: nullptr for those that it does not have.
    struct Call {
        std::vector<const Page*> pages;
        std::vector<const std::byte*> bytes;  // nullptr too where elements lie misaligned
        std::vector<DecodedBlocks*> decoded;  // what is kept of them, or nullptr
        bool all_plain = true;                // every block is used where it lies
    };
    /// The blocks of one call.
    struct BlockCall {
        std::span<const std::int64_t> numbers;
        std::span<const BlockView> views;
    };

    void check_ids(std::span<const std::int64_t> ids) const;

    /// What each call begins with; it checks the pages or blocks that are here.
    [[nodiscard]] Call begin(std::span<const std::int64_t> page_ids,
                             std::span<const Page* const> pages,
                             std::span<DecodedBlocks* const> decoded) const;
    [[nodiscard]] BlockCall begin(std::span<const std::int64_t> numbers,
                                  std::span<const BlockView> views,
                                  std::span<DecodedBlocks* const> decoded) const;

    /// Blocks where they lie on their pages, of rows from the first one to before the end.
    struct Plain {
        const RowPlaces& table;
        const Call& call;
        std::size_t first_row, end_row;
        [[nodiscard]] const std::byte* block(std::size_t b) const noexcept {
            // Of a page that this call does not have, another one may just learn the units.
            const Place& place = table.places_[b];
            const std::byte* const page = call.bytes[place.page];
            if (page == nullptr || place.unit == 0) return nullptr;
            return page + std::size_t{place.unit} * kBlockAlignment;
        }
    };
    /// Some blocks, from the first one on, wherever they are.
    struct Some {
        const std::vector<const std::byte*>& at;
        std::size_t first;
        std::size_t first_row, end_row;
        [[nodiscard]] const std::byte* block(std::size_t b) const noexcept {
            return b - first < at.size() ? at[b - first] : nullptr;  // what is before first, wraps
        }
    };

    /// The row of blocks that has this row. A division takes longer than all else that is done to
    /// look one up.
    [[nodiscard]] std::size_t block_row(std::size_t id) const noexcept {
        return block_rows_log2_ >= 0 ? id >> block_rows_log2_ : id / grid_.block_rows;
    }

    /// The first row in a row of blocks, or behind all of them.
    [[nodiscard]] std::size_t first_row_in(std::size_t block_row) const noexcept {
        return std::min(block_row * grid_.block_rows, grid_.rows);
    }

    /// Of the blocks with a piece of these rows, those that are here, ascending.
    [[nodiscard]] std::vector<std::size_t> blocks_at_hand(const Call& call,
                                                          std::span<const std::int64_t> ids) const;

    /// A block that is here, to be decoded unless that was done and kept; `base` is filled in for a
    /// delta, and is to outlive it.
    [[nodiscard]] BlockView block(const Call& call, std::size_t b, BlockView& base) const {
        const std::uint32_t page = places_[b].page;
        BlockView view = call.pages[page]->block(slots_[b]);
        if (call.decoded[page] != nullptr) call.decoded[page]->show(slots_[b], view);
        return with_base(view, {call.pages, bases_}, b, base);
    }

    const BlockGrid grid_;
    const Dtype dtype_;
    const std::size_t item_;
    const std::size_t grid_cols_;
    const int block_rows_log2_;  // -1: no power of two

  private:
    struct Place {
        std::uint32_t page;      // index into page_ids_
        std::uint32_t unit = 0;  // first byte in units of kBlockAlignment; 0: encoded
    };
    // What is known of a page: nothing, while the serial is 0. Places and `checksum` were written
    // before that and never are again.
    struct Known {
        std::atomic<std::uint64_t> serial{0};
        Digest checksum{};
        bool encoded = false;

        Known() = default;
        // Only to make a vector of them, before anybody else has it.
        Known(const Known&) noexcept {}
    };

    void learn(std::size_t number, const Page& page) const;

    std::vector<std::int64_t> page_ids_;    // each once, ascending
    std::vector<std::uint32_t> slots_;      // per block
    std::vector<StoredBlock> bases_;        // per block, pages by number; empty if none is a delta
    std::vector<std::uint32_t> row_pages_;  // per block row: its page, or kSeveral
    std::vector<std::size_t> starts_;       // per page: where its blocks begin in blocks_; the end
    std::vector<std::size_t> blocks_;       // by page
    mutable std::mutex mutex_;              // of what is written below
    mutable std::vector<Known> known_;      // per page
    mutable std::vector<Place> places_;     // per block
};

}  // namespace pydedup::detail
