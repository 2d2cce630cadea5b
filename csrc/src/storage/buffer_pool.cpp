// SPDX-License-Identifier: Apache-2.0
// The pool keeps an entry per page. An entry is always in exactly one of three lists:
//
//     idle      in the table, no pins                 may be evicted
//     pinned    in the table, one pin or more         never evicted
//     orphans   not in the table, one pin or more     dropped while pinned
//
//     insert:             -> pinned
//     pin:         idle   -> pinned
//     last unpin:  pinned -> idle (its young end);  orphans -> gone
//     evict:       idle -> gone
//     drop, clear: idle -> gone;  pinned -> orphans
//
// Bytes of all three, and reserved ones, count against the budget. `idle` is ordered by the time of
// the last unpin. Entries move between lists by splicing: once a page is in, no move allocates, so
// none can fail.
//
// What is decoded of a page (of `idle` or `pinned` ones) counts as well. It is in one of two lists,
// by the time of its last use: `busy` while a pin_all() of its page lasts, else `spare`, from which
// it goes before any page does.
//
// One mutex guards all of it. Pages are destroyed after it was released: that may run foreign code
// (the owner of a page's memory may be a Python object, whose release waits for the GIL).
#include "pydedup/buffer_pool.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <iterator>
#include <list>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "pydedup/error.hpp"

namespace pydedup {
namespace {

// Of a large pool, so many of the pages unpinned longest ago and of the newest are looked at for
// one to evict.
constexpr std::size_t kLookedAt = 1024;

// Decoded blocks make room for others once so many predictions went by without them.
constexpr std::uint64_t kStaleCalls = 256;

std::atomic<unsigned> fork_count{0};

/// How often this process was forked from another since the pool's code was loaded.
unsigned fork_generation() noexcept {
    static const int registered = pthread_atfork(
        nullptr, nullptr, [] { fork_count.fetch_add(1, std::memory_order_relaxed); });
    static_cast<void>(registered);
    return fork_count.load(std::memory_order_relaxed);
}

}  // namespace

class BufferPool::State : public std::enable_shared_from_this<BufferPool::State> {
  public:
    State(std::size_t budget_bytes, ReplacementPolicy policy)
        : budget_bytes_(budget_bytes), replacement_(policy) {}

    void pin(std::span<const PageId> ids, std::span<Pin> pins, bool ahead) {
        std::vector<Place> found(ids.size());
        std::vector<bool> is_found(ids.size());
        {
            const std::scoped_lock lock(mutex_);
            for (std::size_t i = 0; i < ids.size(); ++i) {
                const auto at = table_.find(ids[i]);
                if (at == table_.end()) {
                    misses_ += ahead ? 0 : 1;
                    continue;
                }
                found[i] = at->second;
                is_found[i] = true;
                if (!ahead) count_use(found[i]);
                add_pin(found[i], 0);
            }
        }
        std::size_t i = 0;
        try {
            for (; i < ids.size(); ++i) pins[i] = is_found[i] ? handle(found[i]) : Pin();
        } catch (...) {  // handle() took its own pin back
            for (++i; i < ids.size(); ++i) {
                if (is_found[i]) unpin(found[i]);
            }
            throw;
        }
    }

    Pins pin_all(std::span<const PageId> ids) {
        // Of one piece, so that nothing can fail once a page is pinned.
        const auto group = std::make_shared<Group>();
        group->pinned.pages.reserve(ids.size());
        group->pinned.decoded.reserve(ids.size());
        group->places.reserve(ids.size());
        {
            const std::scoped_lock lock(mutex_);
            for (const PageId id : ids) {
                const auto at = table_.find(id);
                if (at == table_.end()) return nullptr;
                group->places.push_back(at->second);
            }
            for (const Place place : group->places) {
                count_use(place);
                add_pin(place, 1);
                group->pinned.pages.push_back(&place->page);
                group->pinned.decoded.push_back(read_decoded(place));
            }
            group->state = shared_from_this();
        }
        return {group, &group->pinned};
    }

    Pin insert(PageId id, Page page, bool ahead) {
        const std::size_t bytes = page.nbytes();
        List gone;  // destroyed last, without the lock
        List fresh;
        fresh.emplace_back(id, std::move(page), ahead);
        Place place;
        {
            std::unique_lock lock(mutex_);
            wait_for_room(lock, bytes);
            if (const auto at = table_.find(id); at != table_.end()) {
                place = at->second;
            } else {
                make_room(bytes, "a page of", gone);
                place = fresh.begin();
                place->history = &replacement_.take_in(id);
                try {
                    table_.emplace(id, place);
                } catch (...) {
                    replacement_.give_up(*place->history);
                    throw;
                }
                idle_.splice(idle_.end(), fresh);
                bytes_ += bytes;
                ++inserts_;
            }
            if (!ahead) use(place);
            add_pin(place, 0);
        }
        return handle(place);
    }

    Reservation reserve(std::size_t bytes) {
        List gone;
        {
            std::unique_lock lock(mutex_);
            wait_for_room(lock, bytes);
            make_room(bytes, "a reservation of", gone);
            reserved_bytes_ += bytes;
        }
        // Should there be no memory for the handle, its deleter is called.
        return {this, [state = shared_from_this(), bytes](const void*) { state->release(bytes); }};
    }

    void owns(std::int64_t owner, std::span<const PageId> pages) {
        const std::scoped_lock lock(mutex_);
        replacement_.owns(owner, pages);
    }

    void call(std::int64_t owner) {
        const std::scoped_lock lock(mutex_);
        replacement_.call(owner);
        ++calls_;
        if (is_recording()) trace_.owners.push_back(owner);
    }

    void record(std::size_t max_uses) {
        Trace fresh;
        fresh.pages.reserve(max_uses);
        fresh.bytes.reserve(max_uses);
        fresh.calls.reserve(max_uses);
        const std::scoped_lock lock(mutex_);
        trace_ = std::move(fresh);
        trace_room_ = max_uses;
    }

    [[nodiscard]] Trace recorded() const {
        const std::scoped_lock lock(mutex_);
        return trace_;
    }

    [[nodiscard]] std::size_t count_resident(std::span<const PageId> ids) const {
        const std::scoped_lock lock(mutex_);
        std::size_t count = 0;
        for (const PageId id : ids) count += table_.count(id);
        return count;
    }

    void drop(std::span<const PageId> ids) {
        List gone;
        {
            const std::scoped_lock lock(mutex_);
            for (const PageId id : ids) {
                if (const auto at = table_.find(id); at != table_.end()) forget(at, gone);
            }
        }
    }

    void clear() {
        List gone;
        {
            const std::scoped_lock lock(mutex_);
            while (!table_.empty()) forget(table_.begin(), gone);
        }
    }

    [[nodiscard]] Stats stats() const {
        const std::scoped_lock lock(mutex_);
        const std::size_t pages = idle_.size() + pinned_.size() + orphans_.size();
        return {hits_,  misses_,        inserts_,      evictions_,      pages,
                bytes_, decoded_bytes_, pinned_bytes_, reserved_bytes_, budget_bytes_};
    }

    [[nodiscard]] bool is_inherited() const noexcept { return generation_ != fork_generation(); }

    /// In a forked child: gives back what nobody has pinned, if the lists are whole.
    void give_up() {
        List gone;
        const std::unique_lock lock(mutex_, std::try_to_lock);
        if (lock.owns_lock()) gone.splice(gone.end(), idle_);
    }

  private:
    struct Entry;
    using List = std::list<Entry>;
    using Place = List::iterator;
    using Order = std::list<Place>;
    struct Entry {
        Entry(PageId number, Page content, bool is_ahead)
            : id(number),
              page(std::move(content)),
              ahead(is_ahead),
              decodable(decoded_bytes(page.view())) {}

        PageId id;
        Page page;
        std::size_t pins = 0;
        std::size_t brief_pins = 0;  // those of them that pin_all() gave
        bool orphan = false;
        bool ahead;                               // read before its first use
        Replacement::History* history = nullptr;  // while in the table
        std::size_t decodable;                    // bytes that `decoded` counts with
        std::unique_ptr<DecodedBlocks> decoded = nullptr;
        std::size_t readers = 0;      // of `decoded`
        std::uint64_t last_call = 0;  // that used it
        Order::iterator order{};      // in busy_ or spare_, while there is `decoded`
    };
    using Table = std::unordered_map<PageId, Place>;

    // What pin_all() gives out: unpins when the last copy goes, if it came to pinning.
    struct Group {
        PinnedPages pinned;
        std::vector<Place> places;
        std::shared_ptr<State> state;

        Group() = default;
        Group(const Group&) = delete;
        Group& operator=(const Group&) = delete;
        ~Group() {
            if (state) state->end(pinned, places);
        }
    };

    // The functions below want the mutex held.

    void add_pin(Place place, std::size_t brief) noexcept {
        busy_bytes_ -= busy_bytes_of(place);
        if (place->pins == 0) {
            pinned_.splice(pinned_.end(), idle_, place);
            pinned_bytes_ += place->page.nbytes();
        }
        ++place->pins;
        place->brief_pins += brief;
        busy_bytes_ += busy_bytes_of(place);
    }

    // What of a page is pinned for as long as somebody computes, and no longer.
    [[nodiscard]] static std::size_t busy_bytes_of(Place place) noexcept {
        const bool page = place->pins != 0 && place->pins == place->brief_pins;
        return (page ? place->page.nbytes() : 0) + (place->readers != 0 ? place->decodable : 0);
    }

    void count_use(Place place) noexcept {
        ++(place->ahead ? misses_ : hits_);
        use(place);
    }

    // Whether there is room for more, also of calls: they need not use any page.
    [[nodiscard]] bool is_recording() const noexcept {
        return trace_.pages.size() < trace_room_ && trace_.owners.size() <= trace_room_;
    }

    // Never allocates: there is room for what is recorded.
    void use(Place place) noexcept {
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

    // Returns what is kept decoded of a pinned page, for a reader of it.
    DecodedBlocks* read_decoded(Place place) noexcept {
        if (place->decodable == 0 || (!place->decoded && !keep_decoded(place))) return nullptr;
        if (place->readers++ == 0) {
            busy_.splice(busy_.end(), spare_, place->order);
            busy_bytes_ += place->decodable;
            pinned_bytes_ += place->decodable;
        }
        place->last_call = calls_;
        return place->decoded.get();
    }

    // Gives what is decoded of a page a place in bytes that nobody uses, if there are so many.
    bool keep_decoded(Place place) noexcept {
        const auto fits = [&] {
            return place->decodable <= budget_bytes_ - bytes_ - reserved_bytes_;
        };
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
    void drop_decoded(Place place) noexcept {
        spare_.erase(place->order);
        place->decoded.reset();
        bytes_ -= place->decodable;
        decoded_bytes_ -= place->decodable;
    }

    // Waits while what pin_all() pinned is in the way; not for pages that are pinned otherwise.
    void wait_for_room(std::unique_lock<std::mutex>& lock, std::size_t bytes) {
        read_.wait(lock, [&] {
            const std::size_t taken = pinned_bytes_ + reserved_bytes_;
            return bytes <= budget_bytes_ - taken || bytes > budget_bytes_ - taken + busy_bytes_;
        });
    }

    void make_room(std::size_t bytes, const char* what, List& gone) {
        if (bytes > budget_bytes_ - pinned_bytes_ - reserved_bytes_) {
            throw Error(ErrorCode::out_of_budget,
                        std::string(what) + " " + std::to_string(bytes) +
                            " bytes does not fit: of a budget of " + std::to_string(budget_bytes_) +
                            " bytes, " + std::to_string(pinned_bytes_ + reserved_bytes_) +
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

    [[nodiscard]] Place victim() {
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

    void forget(Table::iterator at, List& gone) noexcept {
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

    void end_reading(Place place) noexcept {
        if (--place->readers != 0) return;
        spare_.splice(spare_.end(), busy_, place->order);
        busy_bytes_ -= place->decodable;
        pinned_bytes_ -= place->decodable;
        if (place->orphan) drop_decoded(place);
    }

    void remove_pin(Place place, std::size_t brief, List& gone) noexcept {
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

    // Those below do not.

    void release(std::size_t bytes) noexcept {
        if (is_inherited()) return;
        const std::scoped_lock lock(mutex_);
        reserved_bytes_ -= bytes;
    }

    // Its pin was counted already. Should there be no memory for the handle, the standard library
    // calls the deleter, which takes the pin back.
    Pin handle(Place place) {
        return {&place->page,
                [state = shared_from_this(), place](const Page*) { state->unpin(place); }};
    }

    void unpin(Place place) noexcept {
        if (is_inherited()) return;
        List gone;
        const std::scoped_lock lock(mutex_);
        remove_pin(place, 0, gone);
    }

    // What pin_all() began.
    void end(const PinnedPages& pinned, std::span<const Place> places) noexcept {
        if (is_inherited()) return;
        List gone;
        {
            const std::scoped_lock lock(mutex_);
            for (std::size_t i = 0; i < places.size(); ++i) {
                if (pinned.decoded[i] != nullptr) end_reading(places[i]);
                remove_pin(places[i], 1, gone);
            }
        }
        read_.notify_all();
    }

    mutable std::mutex mutex_;
    const unsigned generation_ = fork_generation();
    const std::size_t budget_bytes_;
    Table table_;
    List idle_;
    List pinned_;
    List orphans_;
    Order spare_;
    Order busy_;
    std::condition_variable read_;  // what pin_all() pinned is no more
    std::size_t busy_bytes_ = 0;
    std::size_t decoded_bytes_ = 0;
    std::uint64_t calls_ = 0;
    std::size_t bytes_ = 0;
    std::size_t pinned_bytes_ = 0;
    std::size_t reserved_bytes_ = 0;
    Replacement replacement_;
    Trace trace_;
    std::size_t trace_room_ = 0;
    std::uint64_t hits_ = 0;
    std::uint64_t misses_ = 0;
    std::uint64_t inserts_ = 0;
    std::uint64_t evictions_ = 0;
};

BufferPool::BufferPool(std::size_t budget_bytes, ReplacementPolicy policy) {
    if (budget_bytes == 0) {
        throw Error(ErrorCode::invalid_argument, "the budget of a buffer pool must not be 0 bytes");
    }
    state_ = std::make_shared<State>(budget_bytes, policy);
}

BufferPool::~BufferPool() {
    if (state_->is_inherited()) {
        state_->give_up();
        // Leaked: its destructor would walk lists that may be half moved. Without memory for that a
        // forked child ends here. NOLINTNEXTLINE(bugprone-unhandled-exception-at-new)
        static_cast<void>(new std::shared_ptr<State>(std::move(state_)));
    } else {
        state_->clear();
    }
}

void BufferPool::pin(std::span<const PageId> ids, std::span<Pin> pins, bool ahead) {
    state_->pin(ids, pins, ahead);
}

BufferPool::Pins BufferPool::pin_all(std::span<const PageId> ids) { return state_->pin_all(ids); }

BufferPool::Pin BufferPool::insert(PageId id, Page page, bool ahead) {
    return state_->insert(id, std::move(page), ahead);
}

BufferPool::Reservation BufferPool::reserve(std::size_t bytes) { return state_->reserve(bytes); }

void BufferPool::owns(std::int64_t owner, std::span<const PageId> pages) {
    state_->owns(owner, pages);
}

void BufferPool::call(std::int64_t owner) { state_->call(owner); }

void BufferPool::record(std::size_t max_uses) { state_->record(max_uses); }

BufferPool::Trace BufferPool::recorded() const { return state_->recorded(); }

std::size_t BufferPool::count_resident(std::span<const PageId> ids) const {
    return state_->count_resident(ids);
}

void BufferPool::drop(std::span<const PageId> ids) { state_->drop(ids); }

void BufferPool::clear() { state_->clear(); }

BufferPool::Stats BufferPool::stats() const { return state_->stats(); }

}  // namespace pydedup
