// SPDX-License-Identifier: Apache-2.0
// Pages in memory under a hard budget. The pool never reads a page itself: who misses one fetches
// it, outside of any lock, and inserts it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "pydedup/decoded.hpp"
#include "pydedup/page_format.hpp"
#include "pydedup/replacement.hpp"

namespace pydedup {

/// Safe between threads. Pages are immutable, so a pinned page may be read without any lock.
///
/// A forked child may keep using the pins it has and destroy the pool, which is all: it makes a
/// pool of its own. (A thread that was inside the pool does not exist in the child, so its mutex
/// may be locked there forever, and its lists half moved.)
class BufferPool {
  public:
    using PageId = std::int64_t;
    /// Holds a page in the pool for as long as a copy of it lives; may outlive the pool, and may be
    /// dropped on any thread.
    using Pin = std::shared_ptr<const Page>;

    struct PinnedPages {
        std::vector<const Page*> pages;
        /// Of each page what is kept decoded of it; nullptr where nothing is or can be.
        std::vector<DecodedBlocks*> decoded;
    };
    /// As Pin, of several pages.
    using Pins = std::shared_ptr<const PinnedPages>;

    struct Stats {
        std::uint64_t hits;       ///< uses of pages that pin() or pin_all() found
        std::uint64_t misses;     ///< uses for which a page had to be read, then or ahead
        std::uint64_t inserts;    ///< pages taken in
        std::uint64_t evictions;  ///< pages given up for others
        std::size_t pages;        ///< in memory, those dropped but still pinned included
        std::size_t bytes;        ///< of these pages, and decoded; never above the budget
        std::size_t decoded_bytes;
        std::size_t pinned_bytes;
        std::size_t reserved_bytes;  ///< of other things that count
        std::size_t budget_bytes;
    };

    /// Holds bytes of the budget for something else than pages; may outlive the pool.
    using Reservation = std::shared_ptr<const void>;

    /// Uses of pages, oldest first, as a simulator wants them.
    struct Trace {
        std::vector<PageId> pages;
        std::vector<std::uint32_t> bytes;  ///< of each of these pages
        std::vector<std::uint32_t> calls;  ///< how many calls had begun before each use
        std::vector<std::int64_t> owners;  ///< of each call
        bool complete = true;              ///< false when there was no room for the end
    };

    /// Throws Error{invalid_argument} for a budget of 0.
    explicit BufferPool(std::size_t budget_bytes,
                        ReplacementPolicy policy = ReplacementPolicy::reuse);
    ~BufferPool();
    BufferPool(const BufferPool&) = delete;
    BufferPool& operator=(const BufferPool&) = delete;

    /// Pins those of `ids` that are here: pins[i] is empty for the others. Constant time each.
    /// `ahead` of their use this neither counts as one nor as a hit or miss.
    void pin(std::span<const PageId> ids, std::span<Pin> pins, bool ahead = false);

    /// Pins all of `ids` together if all are here, for as long as a copy of the result lives:
    /// one lock, and pages in the order of ids. Else nothing is pinned or counted, and the result
    /// is empty. About 50 ns for a page, a quarter of what pin() and dropping the pin take.
    ///
    /// What encoded blocks of these pages decode to is kept where the budget has bytes that nobody
    /// uses, and is the first that goes when a page needs them. Meant for the length of one
    /// computation, in which nothing waits for the pool: insert() and reserve() of other threads
    /// wait for its end where they need what it holds.
    [[nodiscard]] Pins pin_all(std::span<const PageId> ids);

    /// Takes a page in and pins it. When a page of that id is here already, that one is pinned and
    /// `page` is given up: there is one copy. Evicts unpinned pages, by the policy, as far as the
    /// budget needs. Throws Error{out_of_budget} when pinned pages leave too little room (nothing
    /// is evicted then), or the page is larger than the budget. A page that is `ahead` of its use
    /// is not used by this.
    [[nodiscard]] Pin insert(PageId id, Page page, bool ahead = false);

    /// Takes so many bytes off the budget for as long as a copy of the result lives; evicts as
    /// insert() does. Throws Error{out_of_budget} when pinned pages leave too little room.
    [[nodiscard]] Reservation reserve(std::size_t bytes);

    /// For the policy: a model reads these pages; a prediction of a model begins. If it is not
    /// known which pages the model reads, or not any more, `call` returns false.
    void owns(std::int64_t owner, std::span<const PageId> pages);
    bool call(std::int64_t owner);

    /// Records up to so many uses from now on; 0 ends that. What was recorded before is forgotten.
    void record(std::size_t max_uses);
    /// What was recorded. The recording goes on.
    [[nodiscard]] Trace recorded() const;

    /// How many of `ids` are here. Neither counts nor touches them.
    [[nodiscard]] std::size_t count_resident(std::span<const PageId> ids) const;

    /// Forgets pages. Pinned ones are not found any more, but count until their last pin goes.
    void drop(std::span<const PageId> ids);
    void clear();

    [[nodiscard]] Stats stats() const;

  private:
    class State;
    std::shared_ptr<State> state_;
};

}  // namespace pydedup
