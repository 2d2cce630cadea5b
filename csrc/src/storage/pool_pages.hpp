// SPDX-License-Identifier: Apache-2.0
// The pages of a buffer pool in their lists, and all that is counted of them. Not safe between
// threads: the pool calls everything here with its lock held.
//
// The pool keeps an entry per page. An entry is always in exactly one of three lists:
//
//     idle      in the table, no pins                 may be evicted
//     pinned    in the table, one pin or more         never evicted
//     orphans   not in the table, one pin or more     dropped while pinned
//
//     take_in:            -> idle
//     add_pin:     idle   -> pinned
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
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <unordered_map>

#include "pydedup/buffer_pool.hpp"

namespace pydedup {

class PoolPages {
  public:
    using PageId = BufferPool::PageId;

    struct Entry;
    using List = std::list<Entry>;
    using Place = List::iterator;
    using Order = std::list<Place>;
    struct Entry {
        Entry(PageId number, Page content, bool is_ahead);

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

    PoolPages(std::size_t budget_bytes, ReplacementPolicy policy)
        : budget_bytes_(budget_bytes), replacement_(policy) {}

    /// Where a page is, nullptr when it is not here.
    [[nodiscard]] const Place* find(PageId id) const;

    /// Makes the only entry of `fresh` one of the pool, idle; there must be room for it.
    Place take_in(List& fresh);

    void add_pin(Place place, std::size_t brief) noexcept;
    /// `gone` gets what is not in the pool any more, to be destroyed without its lock.
    void remove_pin(Place place, std::size_t brief, List& gone) noexcept;

    /// A use of a page that was here, or on its way here; count_miss() of one that was not.
    void count_use(Place place) noexcept;
    void count_miss() noexcept { ++misses_; }
    /// A use that was counted already. Never allocates: there is room for what is recorded.
    void use(Place place) noexcept;

    /// What is kept decoded of a pinned page, for a reader of it; nullptr where nothing is.
    DecodedBlocks* read_decoded(Place place) noexcept;
    void end_reading(Place place) noexcept;

    /// Whether waiting for what pin_all() pinned would make room that is not there.
    [[nodiscard]] bool may_get_room(std::size_t bytes) const noexcept;
    /// Evicts until there is room. Throws Error{out_of_budget}, before anything goes.
    void make_room(std::size_t bytes, const char* what, List& gone);
    void reserve(std::size_t bytes) noexcept { reserved_bytes_ += bytes; }
    void release(std::size_t bytes) noexcept { reserved_bytes_ -= bytes; }

    /// Forgets a page, if it is here.
    void drop(PageId id, List& gone) noexcept;
    void clear(List& gone) noexcept;
    /// Gives up the idle pages as they are, with a table that still names them.
    void abandon_idle(List& gone) noexcept { gone.splice(gone.end(), idle_); }

    void owns(std::int64_t owner, std::span<const PageId> pages) {
        replacement_.owns(owner, pages);
    }
    bool call(std::int64_t owner);
    /// `fresh` has room for `max_uses`.
    void record(BufferPool::Trace fresh, std::size_t max_uses) noexcept;
    [[nodiscard]] const BufferPool::Trace& recorded() const noexcept { return trace_; }

    [[nodiscard]] BufferPool::Stats stats() const noexcept;

  private:
    using Table = std::unordered_map<PageId, Place>;

    [[nodiscard]] static std::size_t busy_bytes_of(Place place) noexcept;
    [[nodiscard]] bool is_recording() const noexcept;
    bool keep_decoded(Place place) noexcept;
    void drop_decoded(Place place) noexcept;
    [[nodiscard]] Place victim();
    void forget(Table::iterator at, List& gone) noexcept;

    const std::size_t budget_bytes_;
    Table table_;
    List idle_;
    List pinned_;
    List orphans_;
    Order spare_;
    Order busy_;
    std::size_t busy_bytes_ = 0;
    std::size_t decoded_bytes_ = 0;
    std::uint64_t calls_ = 0;
    std::size_t bytes_ = 0;
    std::size_t pinned_bytes_ = 0;
    std::size_t reserved_bytes_ = 0;
    Replacement replacement_;
    BufferPool::Trace trace_;
    std::size_t trace_room_ = 0;
    std::uint64_t hits_ = 0;
    std::uint64_t misses_ = 0;
    std::uint64_t inserts_ = 0;
    std::uint64_t evictions_ = 0;
};

}  // namespace pydedup
