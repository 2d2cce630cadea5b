// SPDX-License-Identifier: Apache-2.0
// The two tables of the index, with 32-bit numbers instead of pointers. Neither stores what it is
// looked up by: the caller compares. Nothing here throws but grow().
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pydedup::similarity {

inline constexpr std::uint32_t kNone = 0xFFFFFFFFU;

/// Room for `size` elements, by half more at a time.
template <class T>
void reserve_more(std::vector<T>& values, std::size_t size) {
    if (size > values.capacity()) {
        values.reserve(std::max(size, values.capacity() + values.capacity() / 2));
    }
}

/// Items in buckets, each bucket a doubly linked list in order of insertion; the first one's `prev`
/// is the last. A bucket is the low bits of a key that the caller computes.
class Chains {
  public:
    /// Room for items below `count`. True when there are more buckets now and all must be
    /// inserted again (the chains are then empty).
    bool grow(std::size_t count) {
        reserve_more(links_, count);
        if (count > links_.size()) links_.resize(count);
        const std::size_t wanted = std::bit_ceil(std::max<std::size_t>(count, 64));
        if (wanted <= heads_.size()) return false;
        heads_.assign(wanted, kNone);
        return true;
    }

    void clear() noexcept { std::fill(heads_.begin(), heads_.end(), kNone); }

    void append(std::uint64_t key, std::uint32_t item) noexcept {
        std::uint32_t& head = heads_[key & (heads_.size() - 1)];
        if (head == kNone) {
            head = item;
            links_[item] = {kNone, item};
            return;
        }
        const std::uint32_t last = links_[head].prev;
        links_[last].next = item;
        links_[item] = {kNone, last};
        links_[head].prev = item;
    }

    void erase(std::uint64_t key, std::uint32_t item) noexcept {
        std::uint32_t& head = heads_[key & (heads_.size() - 1)];
        const Link link = links_[item];
        if (head == item) {
            head = link.next;
            if (head != kNone) links_[head].prev = link.prev;
            return;
        }
        links_[link.prev].next = link.next;
        links_[link.next == kNone ? head : link.next].prev = link.prev;
    }

    [[nodiscard]] std::uint32_t first(std::uint64_t key) const noexcept {
        return heads_.empty() ? kNone : heads_[key & (heads_.size() - 1)];
    }
    [[nodiscard]] std::uint32_t next(std::uint32_t item) const noexcept {
        return links_[item].next;
    }

    void prefetch_head(std::uint64_t key) const noexcept {
        if (!heads_.empty()) __builtin_prefetch(&heads_[key & (heads_.size() - 1)]);
    }
    void prefetch_link(std::uint32_t item) const noexcept { __builtin_prefetch(&links_[item]); }

    [[nodiscard]] std::size_t memory_bytes() const noexcept {
        return heads_.capacity() * sizeof(std::uint32_t) + links_.capacity() * sizeof(Link);
    }

  private:
    struct Link {
        std::uint32_t next, prev;
    };
    std::vector<std::uint32_t> heads_;
    std::vector<Link> links_;
};

/// Open addressing from ids to numbers; the ids themselves are `ids[number]` of the caller.
class IdMap {
  public:
    void grow(std::size_t count, const std::vector<std::int64_t>& ids) {
        const std::size_t wanted = std::bit_ceil(std::max<std::size_t>(count + count / 2, 64));
        if (wanted <= slots_.size()) return;
        std::vector<std::uint32_t> old(wanted, kNone);
        old.swap(slots_);
        for (const std::uint32_t number : old) {
            if (number != kNone) insert(ids[number], number);
        }
    }

    void insert(std::int64_t id, std::uint32_t number) noexcept {
        std::size_t slot = home(id);
        while (slots_[slot] != kNone) slot = (slot + 1) & (slots_.size() - 1);
        slots_[slot] = number;
    }

    [[nodiscard]] std::uint32_t find(std::int64_t id,
                                     const std::vector<std::int64_t>& ids) const noexcept {
        if (slots_.empty()) return kNone;
        for (std::size_t slot = home(id);; slot = (slot + 1) & (slots_.size() - 1)) {
            const std::uint32_t number = slots_[slot];
            if (number == kNone || ids[number] == id) return number;
        }
    }

    /// Closes the gap by moving back what belongs before it, so that no tombstones pile up.
    void erase(std::int64_t id, const std::vector<std::int64_t>& ids) noexcept {
        const std::size_t mask = slots_.size() - 1;
        std::size_t gap = home(id);
        while (ids[slots_[gap]] != id) gap = (gap + 1) & mask;
        for (std::size_t slot = (gap + 1) & mask; slots_[slot] != kNone; slot = (slot + 1) & mask) {
            const std::size_t wanted = home(ids[slots_[slot]]);
            if (((slot - wanted) & mask) >= ((slot - gap) & mask)) {
                slots_[gap] = slots_[slot];
                gap = slot;
            }
        }
        slots_[gap] = kNone;
    }

    [[nodiscard]] std::size_t memory_bytes() const noexcept {
        return slots_.capacity() * sizeof(std::uint32_t);
    }

  private:
    [[nodiscard]] std::size_t home(std::int64_t id) const noexcept {
        std::uint64_t z = static_cast<std::uint64_t>(id) * 0x9E3779B97F4A7C15ULL;
        z = (z ^ (z >> 32)) * 0xD6E8FEB86659FD93ULL;
        return static_cast<std::size_t>(z >> 32) & (slots_.size() - 1);
    }

    std::vector<std::uint32_t> slots_;
};

}  // namespace pydedup::similarity
