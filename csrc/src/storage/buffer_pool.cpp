// SPDX-License-Identifier: Apache-2.0
// One mutex guards all pages. They are destroyed after it was released: that may run foreign code
// (the owner of a page's memory may be a Python object, whose release waits for the GIL).
#include "pydedup/buffer_pool.hpp"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

#include "pydedup/error.hpp"
#include "storage/pool_pages.hpp"

namespace pydedup {
namespace {

std::atomic<unsigned> fork_count{0};

[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1, std::memory_order_relaxed); });

/// How often this process was forked from another since the pool's code was loaded.
unsigned fork_generation() noexcept { return fork_count.load(std::memory_order_relaxed); }

}  // namespace

class BufferPool::State : public std::enable_shared_from_this<BufferPool::State> {
  public:
    State(std::size_t budget_bytes, ReplacementPolicy policy) : pages_(budget_bytes, policy) {}

    void pin(std::span<const PageId> ids, std::span<Pin> pins, bool ahead) {
        std::vector<Place> found(ids.size());
        std::vector<bool> is_found(ids.size());
        {
            const std::scoped_lock lock(mutex_);
            for (std::size_t i = 0; i < ids.size(); ++i) {
                const Place* const at = pages_.find(ids[i]);
                if (at == nullptr) {
                    if (!ahead) pages_.count_miss();
                    continue;
                }
                found[i] = *at;
                is_found[i] = true;
                if (!ahead) pages_.count_use(found[i]);
                pages_.add_pin(found[i], 0);
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
                const Place* const at = pages_.find(id);
                if (at == nullptr) return nullptr;
                group->places.push_back(*at);
            }
            for (const Place place : group->places) {
                pages_.count_use(place);
                pages_.add_pin(place, 1);
                group->pinned.pages.push_back(&place->page);
                group->pinned.decoded.push_back(pages_.read_decoded(place));
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
            if (const Place* const at = pages_.find(id); at != nullptr) {
                place = *at;
            } else {
                pages_.make_room(bytes, "a page of", gone);
                place = pages_.take_in(fresh);
            }
            if (!ahead) pages_.use(place);
            pages_.add_pin(place, 0);
        }
        return handle(place);
    }

    Reservation reserve(std::size_t bytes) {
        List gone;
        {
            std::unique_lock lock(mutex_);
            wait_for_room(lock, bytes);
            pages_.make_room(bytes, "a reservation of", gone);
            pages_.reserve(bytes);
        }
        // Should there be no memory for the handle, its deleter is called.
        return {this, [state = shared_from_this(), bytes](const void*) { state->release(bytes); }};
    }

    void owns(std::int64_t owner, std::span<const PageId> pages) {
        const std::scoped_lock lock(mutex_);
        pages_.owns(owner, pages);
    }

    bool call(std::int64_t owner) {
        const std::scoped_lock lock(mutex_);
        return pages_.call(owner);
    }

    void record(std::size_t max_uses) {
        Trace fresh;
        fresh.pages.reserve(max_uses);
        fresh.bytes.reserve(max_uses);
        fresh.calls.reserve(max_uses);
        const std::scoped_lock lock(mutex_);
        pages_.record(std::move(fresh), max_uses);
    }

    [[nodiscard]] Trace recorded() const {
        const std::scoped_lock lock(mutex_);
        return pages_.recorded();
    }

    [[nodiscard]] std::size_t count_resident(std::span<const PageId> ids) const {
        const std::scoped_lock lock(mutex_);
        std::size_t count = 0;
        for (const PageId id : ids) count += pages_.find(id) == nullptr ? 0 : 1;
        return count;
    }

    void drop(std::span<const PageId> ids) {
        List gone;
        {
            const std::scoped_lock lock(mutex_);
            for (const PageId id : ids) pages_.drop(id, gone);
        }
    }

    void clear() {
        List gone;
        {
            const std::scoped_lock lock(mutex_);
            pages_.clear(gone);
        }
    }

    [[nodiscard]] Stats stats() const {
        const std::scoped_lock lock(mutex_);
        return pages_.stats();
    }

    [[nodiscard]] bool is_inherited() const noexcept { return generation_ != fork_generation(); }

    /// In a forked child: gives back what nobody has pinned, if the lists are whole.
    void give_up() {
        List gone;
        const std::unique_lock lock(mutex_, std::try_to_lock);
        if (lock.owns_lock()) pages_.abandon_idle(gone);
    }

  private:
    using List = PoolPages::List;
    using Place = PoolPages::Place;

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

    // Waits while what pin_all() pinned is in the way; not for pages that are pinned otherwise.
    void wait_for_room(std::unique_lock<std::mutex>& lock, std::size_t bytes) {
        read_.wait(lock, [&] { return !pages_.may_get_room(bytes); });
    }

    void release(std::size_t bytes) noexcept {
        if (is_inherited()) return;
        const std::scoped_lock lock(mutex_);
        pages_.release(bytes);
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
        pages_.remove_pin(place, 0, gone);
    }

    // What pin_all() began.
    void end(const PinnedPages& pinned, std::span<const Place> places) noexcept {
        if (is_inherited()) return;
        List gone;
        {
            const std::scoped_lock lock(mutex_);
            for (std::size_t i = 0; i < places.size(); ++i) {
                if (pinned.decoded[i] != nullptr) pages_.end_reading(places[i]);
                pages_.remove_pin(places[i], 1, gone);
            }
        }
        read_.notify_all();
    }

    mutable std::mutex mutex_;
    const unsigned generation_ = fork_generation();
    PoolPages pages_;
    std::condition_variable read_;  // what pin_all() pinned is no more
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

bool BufferPool::call(std::int64_t owner) { return state_->call(owner); }

void BufferPool::record(std::size_t max_uses) { state_->record(max_uses); }

BufferPool::Trace BufferPool::recorded() const { return state_->recorded(); }

std::size_t BufferPool::count_resident(std::span<const PageId> ids) const {
    return state_->count_resident(ids);
}

void BufferPool::drop(std::span<const PageId> ids) { state_->drop(ids); }

void BufferPool::clear() { state_->clear(); }

BufferPool::Stats BufferPool::stats() const { return state_->stats(); }

}  // namespace pydedup
