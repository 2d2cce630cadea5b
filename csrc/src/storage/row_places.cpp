// SPDX-License-Identifier: Apache-2.0
// What is learned of each page once, and looked up for each call.
#include "storage/row_places.hpp"

#include <algorithm>
#include <bit>
#include <iterator>
#include <numeric>
#include <string>

#include "gemm/weights.hpp"
#include "pydedup/error.hpp"

namespace pydedup::detail {
namespace {

// A block row whose blocks are on several pages, those of bases included.
constexpr std::uint32_t kSeveral = UINT32_MAX;

}  // namespace

RowPlaces::RowPlaces(const BlockGrid& grid, Dtype dtype, std::span<const std::int64_t> page_ids,
                     std::span<const std::uint32_t> slots,
                     std::span<const std::int64_t> base_page_ids,
                     std::span<const std::uint32_t> base_slots)
    : grid_(grid),
      dtype_(dtype),
      item_(item_bytes(dtype)),
      grid_cols_(grid.grid_cols()),
      block_rows_log2_(std::has_single_bit(grid.block_rows) ? std::countr_zero(grid.block_rows)
                                                            : -1) {
    const std::size_t count = grid.count();
    if (page_ids.size() != count || slots.size() != count) {
        throw Error(ErrorCode::invalid_argument,
                    std::to_string(page_ids.size()) + " page ids and " +
                        std::to_string(slots.size()) + " slots were given for " +
                        std::to_string(count) + " blocks");
    }
    if (base_page_ids.size() != base_slots.size() ||
        (!base_slots.empty() && base_slots.size() != count)) {
        throw Error(ErrorCode::invalid_argument,
                    std::to_string(base_page_ids.size()) + " page ids and " +
                        std::to_string(base_slots.size()) + " slots of bases were given for " +
                        std::to_string(count) + " blocks");
    }
    page_ids_.assign(page_ids.begin(), page_ids.end());
    std::copy_if(base_page_ids.begin(), base_page_ids.end(), std::back_inserter(page_ids_),
                 [](std::int64_t id) { return id >= 0; });
    std::sort(page_ids_.begin(), page_ids_.end());
    page_ids_.erase(std::unique(page_ids_.begin(), page_ids_.end()), page_ids_.end());
    if (page_ids_.size() >= kSeveral) {
        throw Error(ErrorCode::invalid_argument, "a matrix lies on fewer than 2^32 - 1 pages");
    }
    places_.resize(count);
    slots_.assign(slots.begin(), slots.end());
    known_ = std::vector<Known>(page_ids_.size());
    starts_.assign(page_ids_.size() + 1, 0);
    const auto number_of = [this](std::int64_t id) {
        const auto at = std::lower_bound(page_ids_.begin(), page_ids_.end(), id);
        return static_cast<std::uint32_t>(at - page_ids_.begin());
    };
    for (std::size_t b = 0; b < count; ++b) {
        places_[b].page = number_of(page_ids[b]);
        ++starts_[places_[b].page + 1];
    }
    bases_.reserve(base_slots.size());
    for (std::size_t b = 0; b < base_slots.size(); ++b) {
        const std::int64_t id = base_page_ids[b];
        bases_.push_back({id < 0 ? kNoPage : number_of(id), base_slots[b]});
    }
    std::partial_sum(starts_.begin(), starts_.end(), starts_.begin());
    blocks_.resize(count);
    std::vector<std::size_t> next(starts_.begin(), starts_.end() - 1);
    for (std::size_t b = 0; b < count; ++b) blocks_[next[places_[b].page]++] = b;
    // Rows of no elements may be more than memory has room for numbers.
    row_pages_.resize(grid_cols_ == 0 ? 0 : grid.grid_rows());
    for (std::size_t row = 0; row < row_pages_.size(); ++row) {
        const std::span blocks(places_.data() + row * grid_cols_, grid_cols_);
        const bool same = std::all_of(blocks.begin(), blocks.end(), [&](const Place& place) {
            return place.page == blocks[0].page;
        });
        row_pages_[row] = same ? blocks[0].page : kSeveral;
    }
    for (std::size_t b = 0; b < bases_.size(); ++b) {
        if (bases_[b].page != kNoPage) row_pages_[b / grid_cols_] = kSeveral;
    }
}

std::vector<std::int64_t> RowPlaces::pages_of(std::span<const std::int64_t> ids) const {
    check_ids(ids);
    std::vector<std::int64_t> pages;
    if (grid_cols_ == 0) return pages;
    std::vector<std::uint8_t> wanted(page_ids_.size(), 0);
    for (const std::int64_t id : ids) {
        const std::size_t row = block_row(static_cast<std::size_t>(id));
        if (row_pages_[row] != kSeveral) {
            wanted[row_pages_[row]] = 1;
            continue;
        }
        const std::size_t first = row * grid_cols_;
        for (std::size_t b = first; b < first + grid_cols_; ++b) wanted[places_[b].page] = 1;
        if (bases_.empty()) continue;
        for (std::size_t b = first; b < first + grid_cols_; ++b) {
            if (bases_[b].page != kNoPage) wanted[bases_[b].page] = 1;
        }
    }
    for (std::size_t p = 0; p < wanted.size(); ++p) {
        if (wanted[p] != 0) pages.push_back(page_ids_[p]);
    }
    return pages;
}

void RowPlaces::check_ids(std::span<const std::int64_t> ids) const {
    for (const std::int64_t id : ids) {
        if (static_cast<std::uint64_t>(id) < grid_.rows) continue;
        throw Error(ErrorCode::invalid_argument, "id " + std::to_string(id) +
                                                     " is out of range; the matrix has " +
                                                     std::to_string(grid_.rows) + " rows");
    }
}

RowPlaces::Call RowPlaces::begin(std::span<const std::int64_t> page_ids,
                                 std::span<const Page* const> pages,
                                 std::span<DecodedBlocks* const> decoded) const {
    if (page_ids.size() != pages.size() || (!decoded.empty() && decoded.size() != pages.size())) {
        throw Error(ErrorCode::invalid_argument, "each page needs one id");
    }
    Call call;
    call.pages.resize(page_ids_.size(), nullptr);
    call.bytes.resize(page_ids_.size(), nullptr);
    call.decoded.resize(page_ids_.size(), nullptr);
    auto at = page_ids_.begin();
    for (std::size_t i = 0; i < pages.size(); ++i) {
        at = std::lower_bound(at, page_ids_.end(), page_ids[i]);
        if (at == page_ids_.end() || *at != page_ids[i]) {
            throw Error(ErrorCode::invalid_argument,
                        "page " + std::to_string(page_ids[i]) +
                            " is not one of the matrix, or page ids do not ascend");
        }
        const auto number = static_cast<std::size_t>(at - page_ids_.begin());
        const Page& page = *pages[i];
        learn(number, page);
        const std::byte* const bytes = page.view().bytes().data();
        const bool aligned = reinterpret_cast<std::uintptr_t>(bytes) % item_ == 0;
        call.pages[number] = &page;
        call.bytes[number] = aligned ? bytes : nullptr;
        if (!decoded.empty()) call.decoded[number] = decoded[i];
        call.all_plain = call.all_plain && aligned && !known_[number].encoded;
    }
    return call;
}

RowPlaces::BlockCall RowPlaces::begin(std::span<const std::int64_t> numbers,
                                      std::span<const BlockView> views,
                                      std::span<DecodedBlocks* const> /*decoded*/) const {
    if (numbers.size() != views.size()) {
        throw Error(ErrorCode::invalid_argument, "each block needs one number");
    }
    for (std::size_t i = 0; i < numbers.size(); ++i) {
        if (static_cast<std::uint64_t>(numbers[i]) >= places_.size()) {
            throw Error(ErrorCode::invalid_argument, "block " + std::to_string(numbers[i]) +
                                                         " is out of range; the matrix has " +
                                                         std::to_string(places_.size()) +
                                                         " blocks");
        }
        check_block(views[i], grid_, dtype_, static_cast<std::size_t>(numbers[i]));
    }
    return {numbers, views};
}

// Afterwards the places of the page's blocks are known, and hold for this very page.
void RowPlaces::learn(std::size_t number, const Page& page) const {
    Known& known = known_[number];
    if (known.serial.load(std::memory_order_acquire) == page.serial()) return;
    const std::scoped_lock lock(mutex_);
    if (known.serial.load(std::memory_order_relaxed) != 0) {
        if (known.checksum != page.checksum()) {
            throw Error(ErrorCode::corrupt_page,
                        "page " + std::to_string(page_ids_[number]) +
                            " is another one than before; run verify on the store");
        }
        known.serial.store(page.serial(), std::memory_order_release);
        return;
    }
    bool encoded = false;
    for (std::size_t i = starts_[number]; i < starts_[number + 1]; ++i) {
        const std::size_t b = blocks_[i];
        const BlockView block = page.block(slots_[b]);
        check_block(block, grid_, dtype_, b);
        const std::size_t offset = page.view().offset(slots_[b]);
        const bool plain =
            block.encoding == Encoding::raw && offset / kBlockAlignment <= UINT32_MAX;
        places_[b].unit = plain ? static_cast<std::uint32_t>(offset / kBlockAlignment) : 0;
        encoded = encoded || !plain;
    }
    known.encoded = encoded;
    known.checksum = page.checksum();
    known.serial.store(page.serial(), std::memory_order_release);
}

std::vector<std::size_t> RowPlaces::blocks_at_hand(const Call& call,
                                                   std::span<const std::int64_t> ids) const {
    std::vector<std::uint8_t> wanted(row_pages_.size(), 0);
    for (const std::int64_t id : ids) wanted[block_row(static_cast<std::size_t>(id))] = 1;
    std::vector<std::size_t> blocks;
    for (std::size_t row = 0; row < wanted.size(); ++row) {
        if (wanted[row] == 0) continue;
        for (std::size_t b = row * grid_cols_; b < (row + 1) * grid_cols_; ++b) {
            if (call.pages[places_[b].page] != nullptr) blocks.push_back(b);
        }
    }
    return blocks;
}

}  // namespace pydedup::detail
