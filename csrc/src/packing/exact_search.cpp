// SPDX-License-Identifier: Apache-2.0
// Branch and bound over blocks, large ones first: each goes on every page with room for it, the one
// that costs least first. Of pages with the same room and readers one is tried, and blocks of one
// class and size go on pages in ascending order: other placements differ in names only.
#include "packing/exact_search.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

namespace pydedup::packing {
namespace {

constexpr std::uint64_t kMostWork = 4'000'000;  // steps of about 3 ns
constexpr std::size_t kMostModels = 64;

struct Item {
    std::uint64_t size;
    std::uint64_t owners;  // set of local models
    Index block;
    bool like_last;  // same class and size as the item before
};

enum class Verdict : std::uint8_t { found, none, gave_up };

class Search {
  public:
    Search(const Mixed& mixed, std::span<const PageBlocks> pages)
        : mixed_(mixed), capacity_(mixed.problem.capacity) {
        for (const PageBlocks& page : pages) {
            for (const Index b : page) add_item(b);
        }
    }

    [[nodiscard]] bool fits() const noexcept { return weights_.size() <= kMostModels; }
    [[nodiscard]] bool found() const noexcept { return found_; }

    void prepare() {
        std::ranges::sort(items_, [&](const Item& a, const Item& b) {
            if (a.size != b.size) return a.size > b.size;
            const std::int64_t left = weight(a.owners);
            const std::int64_t right = weight(b.owners);
            if (left != right) return left > right;
            return mixed_.before(a.block, b.block);
        });
        for (std::size_t i = 1; i < items_.size(); ++i) {
            items_[i].like_last =
                items_[i].size == items_[i - 1].size && items_[i].owners == items_[i - 1].owners;
        }
        // Amounts from item i on: of each model, and of all.
        left_of_.assign((items_.size() + 1) * weights_.size(), 0);
        left_.assign(items_.size() + 1, 0);
        for (std::size_t i = items_.size(); i-- > 0;) {
            left_[i] = left_[i + 1] + items_[i].size;
            for (std::size_t m = 0; m < weights_.size(); ++m) {
                const bool owns = (items_[i].owners >> m & 1) != 0;
                left_of_[i * weights_.size() + m] =
                    left_of_[(i + 1) * weights_.size() + m] + (owns ? items_[i].size : 0);
            }
        }
    }

    /// A layout on up to `pages` pages with less than `below` weighted reads.
    Verdict run(std::size_t pages, std::int64_t below, std::int64_t least) {
        pages_ = pages;
        best_ = below;
        least_ = least;
        found_ = false;
        room_.fill(capacity_);
        readers_.fill(0);
        room_of_.fill(0);
        place(0, 0, 0);
        if (work_ > kMostWork) return Verdict::gave_up;
        return found_ ? Verdict::found : Verdict::none;
    }

    [[nodiscard]] std::vector<PageBlocks> layout() const {
        std::vector<PageBlocks> pages(pages_);
        for (std::size_t i = 0; i < items_.size(); ++i) {
            pages[best_page_[i]].push_back(items_[i].block);
        }
        std::erase_if(pages, [](const PageBlocks& page) { return page.empty(); });
        for (PageBlocks& page : pages) {
            std::ranges::sort(page, [&](Index a, Index b) { return mixed_.before(a, b); });
        }
        return pages;
    }

  private:
    void add_item(Index block) {
        std::uint64_t owners = 0;
        for (const Index m : mixed_.owners.row(mixed_.class_of[block])) {
            auto at = static_cast<std::size_t>(std::ranges::find(models_, m) - models_.begin());
            if (at == models_.size()) {
                models_.push_back(m);
                weights_.push_back(mixed_.problem.weights[m]);
            }
            if (at < kMostModels) owners |= std::uint64_t{1} << at;
        }
        items_.push_back({mixed_.problem.amount(block), owners, block, false});
    }

    [[nodiscard]] std::int64_t weight(std::uint64_t models) const {
        std::int64_t sum = 0;
        for (; models != 0; models &= models - 1) {
            sum += weights_[static_cast<std::size_t>(std::countr_zero(models))];
        }
        return sum;
    }

    /// What items from `i` on add at least: what of a model does not fit on the pages it reads
    /// needs others. kNever when they do not fit at all.
    [[nodiscard]] std::int64_t least_added(std::size_t i) const {
        std::uint64_t room = 0;
        const std::uint64_t smallest = items_.back().size;
        for (std::size_t p = 0; p < pages_; ++p) room += room_[p] >= smallest ? room_[p] : 0;
        if (room < left_[i]) return kNever;
        std::int64_t added = 0;
        const std::uint64_t* left = &left_of_[i * weights_.size()];
        for (std::size_t m = 0; m < weights_.size(); ++m) {
            if (left[m] <= room_of_[m]) continue;
            const std::uint64_t over = left[m] - room_of_[m];
            const std::uint64_t more = over / capacity_ + (over % capacity_ != 0 ? 1 : 0);
            added += weights_[m] * static_cast<std::int64_t>(more);
        }
        return added;
    }

    void place(std::size_t i, std::int64_t reads, std::size_t last_page) {
        if (i == items_.size()) {
            best_ = reads;
            found_ = true;
            std::ranges::copy(page_, best_page_.begin());
            return;
        }
        work_ += pages_ + weights_.size();
        if (work_ > kMostWork) return;
        const std::int64_t added = least_added(i);
        if (added == kNever || reads + added >= best_) return;

        const Item& item = items_[i];
        std::array<std::pair<std::int64_t, std::size_t>, kFewBlocks> choices;
        std::size_t n = 0;
        for (std::size_t p = item.like_last ? last_page : 0; p < pages_; ++p) {
            if (room_[p] < item.size) continue;
            const bool seen = std::any_of(choices.begin(), choices.begin() + n, [&](const auto& c) {
                return room_[c.second] == room_[p] && readers_[c.second] == readers_[p];
            });
            if (!seen) choices[n++] = {weight(item.owners & ~readers_[p]), p};
        }
        std::sort(choices.begin(), choices.begin() + n);
        for (std::size_t c = 0; c < n; ++c) {
            const auto [more, p] = choices[c];
            if (reads + more >= best_) return;
            const std::uint64_t readers = readers_[p];
            put(item, p);
            page_[i] = p;
            place(i + 1, reads + more, p);
            take_back(item, p, readers);
            if (best_ <= least_ || work_ > kMostWork) return;
        }
    }

    void put(const Item& item, std::size_t p) {
        for (std::uint64_t set = readers_[p]; set != 0; set &= set - 1) {
            room_of_[static_cast<std::size_t>(std::countr_zero(set))] -= item.size;
        }
        room_[p] -= item.size;
        for (std::uint64_t set = item.owners & ~readers_[p]; set != 0; set &= set - 1) {
            room_of_[static_cast<std::size_t>(std::countr_zero(set))] += room_[p];
        }
        readers_[p] |= item.owners;
    }

    void take_back(const Item& item, std::size_t p, std::uint64_t readers) {
        for (std::uint64_t set = item.owners & ~readers; set != 0; set &= set - 1) {
            room_of_[static_cast<std::size_t>(std::countr_zero(set))] -= room_[p];
        }
        readers_[p] = readers;
        room_[p] += item.size;
        for (std::uint64_t set = readers; set != 0; set &= set - 1) {
            room_of_[static_cast<std::size_t>(std::countr_zero(set))] += item.size;
        }
    }

    static constexpr std::int64_t kNever = -1;

    const Mixed& mixed_;
    std::uint64_t capacity_;
    std::vector<Index> models_;          // local to global
    std::vector<std::int64_t> weights_;  // per local model
    std::vector<Item> items_;
    std::vector<std::uint64_t> left_of_, left_;
    std::size_t pages_ = 0;
    std::array<std::uint64_t, kFewBlocks> room_{}, readers_{};  // per page
    std::array<std::uint64_t, kMostModels> room_of_{};          // per model, on pages it reads
    std::array<std::size_t, kFewBlocks> page_{}, best_page_{};  // per item
    std::int64_t best_ = 0;
    std::int64_t least_ = 0;
    bool found_ = false;
    std::uint64_t work_ = 0;
};

}  // namespace

bool search_exactly(const Mixed& mixed, std::vector<PageBlocks>& pages, std::size_t least_pages,
                    std::int64_t least_reads) {
    std::size_t blocks = 0;
    for (const PageBlocks& page : pages) blocks += page.size();
    if (blocks > kFewBlocks) return false;
    Search search(mixed, pages);
    if (!search.fits()) return false;
    search.prepare();
    const std::size_t now = pages.size();
    for (std::size_t count = least_pages; count <= now; ++count) {
        const std::int64_t below =
            count < now ? std::numeric_limits<std::int64_t>::max() : weighted_reads(mixed, pages);
        if (count == now && below <= least_reads) return true;
        const Verdict verdict = search.run(count, below, least_reads);
        if (search.found()) pages = search.layout();
        if (verdict == Verdict::gave_up) return false;
        if (verdict == Verdict::found) return true;
    }
    return true;
}

}  // namespace pydedup::packing
