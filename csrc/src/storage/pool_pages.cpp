// SPDX-License-Identifier: Apache-2.0
#include "storage/pool_pages.hpp"

#include <algorithm>
#include <iterator>
#include <new>
#include <string>
#include <utility>

#include "pydedup/error.hpp"

namespace pydedup {
namespace {

// Of a large pool, so many of the pages unpinned longest ago and of the newest are looked at for
// one to evict.
constexpr std::size_t kLookedAt = 1024;

// Decoded blocks make room for others once so many predictions went by without them.
constexpr std::uint64_t kStaleCalls = 256;

}  // namespace

PoolPages::Entry::Entry(PageId number, Page content, bool is_ahead)
    : id(number),
      page(std::move(content)),
      ahead(is_ahead),
      decodable(pydedup::decoded_bytes(page.view())) {}

const PoolPages::Place* PoolPages::find(PageId id) const {
    const auto at = table_.find(id);
    return at == table_.end() ? nullptr : &at->second;
}

PoolPages::Place PoolPages::take_in(List& fresh) {
    const Place place = fresh.begin();
    place->history = &replacement_.take_in(place->id);
    try {
        table_.emplace(place->id, place);
    } catch (...) {
        replacement_.give_up(*place->history);
        throw;
    }
    idle_.splice(idle_.end(), fresh);
    bytes_ += place->page.nbytes();
    ++inserts_;
    return place;
}

// ---- pins -----------------------------------------------------------------------------------

void PoolPages::add_pin(Place place, std::size_t brief) noexcept {
    busy_bytes_ -= busy_bytes_of(place);
    if (place->pins == 0) {
        pinned_.splice(pinned_.end(), idle_, place);
        pinned_bytes_ += place->page.nbytes();
    }
    ++place->pins;
    place->brief_pins += brief;
    busy_bytes_ += busy_bytes_of(place);
}

void PoolPages::remove_pin(Place place, std::size_t brief, List& gone) noexcept {
    busy_bytes_ -= busy_bytes_of(place);
    --place->pins;
    place->brief_pins -= brief;
    busy_bytes_ += busy_bytes_of(place);
    if (place->pins != 0) return;
    pinned_bytes_ -= place->page.nbytes();
    if (place->orphan) {
        bytes_ -= place->page.nbytes();
        gone.splice(gone.end(), orphans_, place);
    } else {
        idle_.splice(idle_.end(), pinned_, place);
    }
}

// What of a page is pinned for as long as somebody computes, and no longer.
std::size_t PoolPages::busy_bytes_of(Place place) noexcept {
    const bool page = place->pins != 0 && place->pins == place->brief_pins;
    return (page ? place->page.nbytes() : 0) + (place->readers != 0 ? place->decodable : 0);
}

// ---- uses -----------------------------------------------------------------------------------

void PoolPages::count_use(Place place) noexcept {
    ++(place->ahead ? misses_ : hits_);
    use(place);
}

void PoolPages::use(Place place) noexcept {
    place->ahead = false;
    replacement_.use(*place->history);
    if (is_recording()) {
        trace_.pages.push_back(place->id);
        trace_.bytes.push_back(static_cast<std::uint32_t>(place->page.nbytes()));
        trace_.calls.push_back(static_cast<std::uint32_t>(trace_.owners.size()));
    } else {
        trace_.complete = trace_room_ == 0;
    }
}

bool PoolPages::call(std::int64_t owner) {
    const bool is_known = replacement_.call(owner);
    ++calls_;
    if (is_recording()) trace_.owners.push_back(owner);
    return is_known;
}

void PoolPages::record(BufferPool::Trace fresh, std::size_t max_uses) noexcept {
    trace_ = std::move(fresh);
    trace_room_ = max_uses;
}

// Whether there is room for more, also of calls: they need not use any page.
bool PoolPages::is_recording() const noexcept {
    return trace_.pages.size() < trace_room_ && trace_.owners.size() <= trace_room_;
}

// ---- what is decoded ------------------------------------------------------------------------

DecodedBlocks* PoolPages::read_decoded(Place place) noexcept {
    if (place->decodable == 0 || (!place->decoded && !keep_decoded(place))) return nullptr;
    if (place->readers++ == 0) {
        busy_.splice(busy_.end(), spare_, place->order);
        busy_bytes_ += place->decodable;
        pinned_bytes_ += place->decodable;
    }
    place->last_call = calls_;
    return place->decoded.get();
}

void PoolPages::end_reading(Place place) noexcept {
    if (--place->readers != 0) return;
    spare_.splice(spare_.end(), busy_, place->order);
    busy_bytes_ -= place->decodable;
    pinned_bytes_ -= place->decodable;
    if (place->orphan) drop_decoded(place);
}

// Gives what is decoded of a page a place in bytes that nobody uses, if there are so many.
bool PoolPages::keep_decoded(Place place) noexcept {
    const auto fits = [&] { return place->decodable <= budget_bytes_ - bytes_ - reserved_bytes_; };
    while (!fits() && !spare_.empty() && calls_ - spare_.front()->last_call >= kStaleCalls) {
        drop_decoded(spare_.front());
    }
    if (!fits()) return false;
    try {
        place->decoded = std::make_unique<DecodedBlocks>(place->page.view());
        place->order = spare_.insert(spare_.end(), place);
    } catch (const std::bad_alloc&) {
        place->decoded.reset();
        return false;
    }
    bytes_ += place->decodable;
    decoded_bytes_ += place->decodable;
    return true;
}

// Of one without readers.
void PoolPages::drop_decoded(Place place) noexcept {
    spare_.erase(place->order);
    place->decoded.reset();
    bytes_ -= place->decodable;
    decoded_bytes_ -= place->decodable;
}

// ---- room -----------------------------------------------------------------------------------

bool PoolPages::may_get_room(std::size_t bytes) const noexcept {
    const std::size_t left = budget_bytes_ - pinned_bytes_ - reserved_bytes_;
    return bytes > left && bytes <= left + busy_bytes_;
}

void PoolPages::make_room(std::size_t bytes, const char* what, List& gone) {
    if (bytes > budget_bytes_ - pinned_bytes_ - reserved_bytes_) {
        throw Error(ErrorCode::out_of_budget,
                    std::string(what) + " " + std::to_string(bytes) +
                        " bytes does not fit: of the " + std::to_string(budget_bytes_) +
                        " bytes for pages, " + std::to_string(pinned_bytes_ + reserved_bytes_) +
                        " are in use; open the store with more memory");
    }
    while (bytes > budget_bytes_ - bytes_ - reserved_bytes_) {
        if (!spare_.empty()) {
            drop_decoded(spare_.front());
            continue;
        }
        forget(table_.find(victim()->id), gone);
        ++evictions_;
    }
}

PoolPages::Place PoolPages::victim() {
    if (replacement_.policy() == ReplacementPolicy::lru) return idle_.begin();
    if (replacement_.policy() == ReplacementPolicy::mru) return std::prev(idle_.end());
    Place least = idle_.begin();
    double worth = replacement_.worth(*least->history, least->page.nbytes());
    const auto look = [&](Place place) {
        const double its = replacement_.worth(*place->history, place->page.nbytes());
        if (its <= worth) {
            least = place;
            worth = its;
        }
    };
    Place old = std::next(idle_.begin());
    const std::size_t others = idle_.size() - 1;
    for (std::size_t i = 0; i < std::min(others, kLookedAt); ++i) look(old++);
    Place young = idle_.end();
    for (std::size_t i = kLookedAt; i < std::min(others, 2 * kLookedAt); ++i) look(--young);
    return least;
}

void PoolPages::drop(PageId id, List& gone) noexcept {
    if (const auto at = table_.find(id); at != table_.end()) forget(at, gone);
}

void PoolPages::clear(List& gone) noexcept {
    while (!table_.empty()) forget(table_.begin(), gone);
}

void PoolPages::forget(Table::iterator at, List& gone) noexcept {
    const Place place = at->second;
    table_.erase(at);
    replacement_.give_up(*place->history);
    if (place->decoded && place->readers == 0) drop_decoded(place);
    if (place->pins != 0) {
        place->orphan = true;
        orphans_.splice(orphans_.end(), pinned_, place);
    } else {
        bytes_ -= place->page.nbytes();
        gone.splice(gone.end(), idle_, place);
    }
}

BufferPool::Stats PoolPages::stats() const noexcept {
    const std::size_t pages = idle_.size() + pinned_.size() + orphans_.size();
    return {hits_,  misses_,        inserts_,      evictions_,      pages,
            bytes_, decoded_bytes_, pinned_bytes_, reserved_bytes_, budget_bytes_};
}

}  // namespace pydedup
