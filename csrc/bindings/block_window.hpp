// SPDX-License-Identifier: Apache-2.0
// The blocks of one window of a walk, by where they are on pages of a pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "blocks.hpp"
#include "pydedup/buffer_pool.hpp"

namespace pydedup {

/// Where raw blocks lie in memory is remembered for as long as their pages are the same ones: for a
/// single row of x, to look them up in the directories of their pages takes a tenth of the product.
///
/// Threads use a window at once, and a Python may have no GIL. They wait for each other nowhere:
/// who cannot look at what is remembered, since another one does, finds the blocks by himself. So a
/// fork in the middle of that costs no more.
class BlockWindow {
  public:
    /// Block i is on page page_ids[page_index[i]], slot slots[i]. `bases` is None, or a tuple of
    /// the index of each block's base among these pages (-1 for none) and of its slot.
    BlockWindow(const Array<std::int64_t>& page_ids, const Array<std::uint32_t>& page_index,
                const Array<std::uint32_t>& slots, const py::object& bases)
        : ids_(as_copy(page_ids, "page_ids")),
          page_of_(as_copy(page_index, "page_index")),
          slot_of_(as_copy(slots, "slots")),
          base_of_(places_of_bases(bases, 0, page_of_.size())) {
        check_places(page_of_.size(), slot_of_.size());
    }

    /// Calls use(blocks) with the blocks, their pages pinned meanwhile, and returns true; or does
    /// nothing, when one of the pages is not there. No page becomes a Python object: for 64 of them
    /// that costs as long as a row of a product.
    template <class Use>
    [[nodiscard]] bool use(BufferPool& pool, unsigned threads, const Use& use) {
        const std::shared_ptr<const Found> before = remembered();
        std::shared_ptr<const Found> now;
        {
            const WithoutGil no_gil;
            const BufferPool::Pins pins = pool.pin_all(ids_);
            if (!pins) return false;
            if (before && before->is_on(pins->pages)) {
                use(before->blocks());
                return true;
            }
            Views views;
            (*views).resize(page_of_.size());
            view_blocks(pins->pages, page_of_, slot_of_, *views, threads, pins->decoded);
            std::vector<BlockView> base_blocks(base_of_.size());
            const StoredBases of{pins->pages, base_of_};
            for (std::size_t i = 0; i < base_of_.size(); ++i) {
                (*views)[i] = with_base((*views)[i], of, i, base_blocks[i]);
            }
            use(std::span<const BlockView>(*views));
            now = Found::of(*pins, *views);
        }
        // Nothing takes the place of what is no longer true, too: others may need its memory.
        remember(std::move(now));
        return true;
    }

    /// Whether where the blocks lay is remembered.
    [[nodiscard]] bool remembers() noexcept { return remembered() != nullptr; }

  private:
    // Views of raw blocks, and which pages they are on.
    class Found {
      public:
        // Nothing for blocks of which some are encoded: how these are seen changes with what is
        // kept decoded of them. Nothing either once enough is remembered.
        [[nodiscard]] static std::shared_ptr<const Found> of(const BufferPool::PinnedPages& pages,
                                                             std::span<const BlockView> views) {
            const auto is_kept = [](const DecodedBlocks* decoded) { return decoded != nullptr; };
            const auto is_raw = [](const BlockView& view) {
                return view.encoding == Encoding::raw;
            };
            if (std::any_of(pages.decoded.begin(), pages.decoded.end(), is_kept) ||
                !std::all_of(views.begin(), views.end(), is_raw)) {
                return nullptr;
            }
            const std::size_t bytes =
                views.size_bytes() + pages.pages.size() * sizeof(std::uint64_t);
            if (total_.fetch_add(bytes, std::memory_order_relaxed) + bytes > kMostRemembered) {
                total_.fetch_sub(bytes, std::memory_order_relaxed);
                return nullptr;
            }
            try {
                return std::make_shared<const Found>(pages.pages, views, bytes);
            } catch (const std::bad_alloc&) {  // the product itself is there
                total_.fetch_sub(bytes, std::memory_order_relaxed);
                return nullptr;
            }
        }
        Found(std::span<const Page* const> pages, std::span<const BlockView> views,
              std::size_t bytes)
            : bytes_(bytes), views_(views.begin(), views.end()) {
            serials_.reserve(pages.size());
            for (const Page* page : pages) serials_.push_back(page->serial());
        }
        ~Found() { total_.fetch_sub(bytes_, std::memory_order_relaxed); }
        Found(const Found&) = delete;
        Found& operator=(const Found&) = delete;

        [[nodiscard]] bool is_on(std::span<const Page* const> pages) const noexcept {
            return std::equal(
                pages.begin(), pages.end(), serials_.begin(), serials_.end(),
                [](const Page* page, std::uint64_t serial) { return page->serial() == serial; });
        }
        [[nodiscard]] std::span<const BlockView> blocks() const noexcept { return views_; }

      private:
        // Bytes, of all windows of the process: for 2.6 GiB of f32 in blocks of 64 x 64.
        static constexpr std::size_t kMostRemembered = std::size_t{8} << 20;
        static inline std::atomic<std::size_t> total_{0};

        std::size_t bytes_;
        std::vector<std::uint64_t> serials_;
        std::vector<BlockView> views_;
    };

    [[nodiscard]] std::shared_ptr<const Found> remembered() noexcept {
        if (taken_.test_and_set(std::memory_order_acquire)) return nullptr;
        std::shared_ptr<const Found> found = found_;
        taken_.clear(std::memory_order_release);
        return found;
    }

    void remember(std::shared_ptr<const Found> now) noexcept {
        if (taken_.test_and_set(std::memory_order_acquire)) return;
        found_.swap(now);
        taken_.clear(std::memory_order_release);
    }

    std::vector<std::int64_t> ids_;
    std::vector<std::uint32_t> page_of_;
    std::vector<std::uint32_t> slot_of_;
    std::vector<StoredBlock> base_of_;
    std::atomic_flag taken_;  // while found_ is looked at or changed
    std::shared_ptr<const Found> found_;
};

}  // namespace pydedup
