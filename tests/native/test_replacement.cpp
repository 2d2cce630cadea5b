// SPDX-License-Identifier: Apache-2.0
// The buffer pool: which page goes first, by each policy, and what of uses is recorded.
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "check.hpp"
#include "pool_pages.hpp"
#include "pydedup/error.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

// How many pieces of memory there are that were not given back.
std::atomic<long> pieces{0};

void* allocate(std::size_t bytes) {
    void* const memory = std::malloc(bytes == 0 ? 1 : bytes);
    if (memory == nullptr) throw std::bad_alloc();
    ++pieces;
    return memory;
}

void give_back(void* memory) noexcept {
    if (memory == nullptr) return;
    --pieces;
    std::free(memory);
}

}  // namespace

void* operator new(std::size_t bytes) { return allocate(bytes); }
void* operator new[](std::size_t bytes) { return allocate(bytes); }
void operator delete(void* memory) noexcept { give_back(memory); }
void operator delete[](void* memory) noexcept { give_back(memory); }
void operator delete(void* memory, std::size_t) noexcept { give_back(memory); }
void operator delete[](void* memory, std::size_t) noexcept { give_back(memory); }

namespace {

TEST(the_least_recently_used_page_goes_first) {
    BufferPool pool(3 * page_size(), ReplacementPolicy::lru);
    for (PageId id = 1; id <= 3; ++id) static_cast<void>(pool.insert(id, make_page(1)));
    static_cast<void>(pin_one(pool, 1));
    static_cast<void>(pool.insert(4, make_page(1)));
    CHECK(resident(pool, 1) && !resident(pool, 2) && resident(pool, 3) && resident(pool, 4));
    static_cast<void>(pool.insert(5, make_page(1)));
    CHECK(resident(pool, 1) && !resident(pool, 3));
    CHECK(pool.stats().evictions == 2);
}

TEST(the_most_recently_used_page_goes_first) {
    BufferPool pool(3 * page_size(), ReplacementPolicy::mru);
    for (PageId id = 1; id <= 3; ++id) static_cast<void>(pool.insert(id, make_page(1)));
    static_cast<void>(pin_one(pool, 1));
    static_cast<void>(pool.insert(4, make_page(1)));
    CHECK(!resident(pool, 1) && resident(pool, 2) && resident(pool, 3) && resident(pool, 4));
}

TEST(pages_of_a_busy_model_survive_a_pass_over_others) {
    BufferPool pool(4 * page_size());
    const std::vector<PageId> busy{1, 2};
    pool.owns(7, busy);
    for (int round = 0; round < 10; ++round) {
        pool.call(7);
        for (const PageId id : busy) {
            if (!pin_one(pool, id)) static_cast<void>(pool.insert(id, make_page(1)));
        }
    }
    pool.call(8);
    for (PageId id = 100; id < 120; ++id) static_cast<void>(pool.insert(id, make_page(1)));
    CHECK(pool.count_resident(busy) == 2);
    CHECK(pool.stats().evictions == 18);
}

// However many pages there are: those used longest ago are looked at, and those used last.
TEST(a_page_that_came_last_may_go_first) {
    constexpr PageId kMany = 1500;  // more than are looked at from either side
    BufferPool pool(kMany * page_size(), ReplacementPolicy::lru2);
    for (PageId id = 1; id <= kMany; ++id) static_cast<void>(pool.insert(id, make_page(1)));
    for (PageId id = 1; id < kMany; ++id) static_cast<void>(pin_one(pool, id));
    pool.drop(std::vector<PageId>{kMany});
    static_cast<void>(pool.insert(kMany + 1, make_page(1)));  // the only one that was used once
    static_cast<void>(pool.insert(kMany + 2, make_page(1)));
    CHECK(!resident(pool, kMany + 1) && resident(pool, 1));
    CHECK(pool.stats().evictions == 1);
}

// Used often, by chance or at even distances, and then no more: others have the room soon.
TEST(a_page_that_is_overdue_makes_room) {
    constexpr PageId kPages = 40;
    for (const bool even : {true, false}) {
        BufferPool pool(kPages * page_size());
        const auto use = [&](PageId id) {
            if (!pin_one(pool, id)) static_cast<void>(pool.insert(id, make_page(1)));
        };
        for (std::size_t i = 0; i < 40; ++i) {
            use(1);
            const std::size_t gap = even ? 4 : i % 3 == 0 ? 12 : i % 2;
            for (std::size_t other = 0; other < gap; ++other) use(2);
        }
        for (int round = 0; round < 10; ++round) {
            for (PageId id = 100; id < 100 + kPages; ++id) use(id);
        }
        CHECK(!resident(pool, 1));
    }
}

TEST(a_page_that_comes_at_even_distances_is_awaited_and_one_that_comes_by_chance_is_not) {
    const auto waits = [](std::size_t odd_gap, std::size_t even_gap) {
        Replacement replacement(ReplacementPolicy::reuse);
        Replacement::History& page = replacement.take_in(1);
        Replacement::History& other = replacement.take_in(2);
        const auto pass = [&](std::size_t ticks) {
            for (std::size_t i = 0; i < ticks; ++i) replacement.use(other);
        };
        for (std::size_t i = 0; i < 12; ++i) {
            replacement.use(page);
            pass(i % 2 == 0 ? even_gap : odd_gap);
        }
        replacement.use(page);
        pass(2);
        const double soon = replacement.wait(page);
        pass(13);
        return std::pair(soon, replacement.wait(page));
    };
    const auto [even_soon, even_late] = waits(19, 19);
    CHECK(even_soon > 15 && even_late < 8);
    const auto [chance_soon, chance_late] = waits(3, 35);
    CHECK(chance_soon > 15 && chance_late >= chance_soon);
}

TEST(sets_of_owners_that_no_page_has_any_more_are_forgotten) {
    constexpr int kOwners = 400;
    Replacement replacement(ReplacementPolicy::reuse);
    const std::vector<PageId> pages{1, 2};
    replacement.owns(0, pages);
    const long before = pieces;
    for (int owner = 1; owner <= kOwners; ++owner) replacement.owns(owner, pages);
    CHECK(pieces - before < 2 * kOwners);  // one for each owner, not one for each set as well
}

// A server of nightly versions has called thousands that are gone, all of them on the same bases.
TEST(models_that_were_not_called_for_long_are_forgotten) {
    constexpr int kNights = 4000;
    constexpr int kPages = 20;
    Replacement replacement(ReplacementPolicy::reuse);
    std::vector<PageId> bases;
    std::vector<Replacement::History*> pages;
    for (PageId id = 0; id < kPages; ++id) {
        bases.push_back(id);
        pages.push_back(&replacement.take_in(id));
    }
    const auto uses = [&](int count) {
        for (int i = 0; i < count; ++i)
            replacement.use(*pages[static_cast<std::size_t>(i) % kPages]);
    };
    long most = 0;
    for (int night = 1; night <= kNights; ++night) {
        const std::vector<PageId> own{1000 + night};  // a page that is never in memory
        replacement.owns(night, bases);
        replacement.owns(night, own);
        CHECK(replacement.call(night));
        CHECK(replacement.call(night));
        uses(1024);  // a horizon
        if (night % 500 != 0) continue;
        if (night == 1000) most = pieces;
        CHECK(night <= 1000 || pieces < most + 1000);
    }
    CHECK(replacement.call(kNights - 1));
    CHECK(!replacement.call(1));  // it is to be said anew what it reads
    replacement.owns(1, bases);
    CHECK(replacement.call(1));
    for (const auto* page : pages) CHECK(page->group == pages.front()->group && page->group != 0);
}

TEST(what_is_known_of_pages_stays_when_models_are_forgotten) {
    const auto rates = [](int replaced) {
        Replacement replacement(ReplacementPolicy::locality);
        const std::vector<PageId> hot{1}, cold{2}, busy{1, 3};
        for (const PageId id : {1, 2, 3}) static_cast<void>(replacement.take_in(id));
        Replacement::History& page = replacement.take_in(1);
        replacement.owns(7, busy);
        replacement.owns(8, cold);
        replacement.call(8);
        for (int model = 100; model < 100 + replaced; ++model) {
            replacement.owns(model, hot);
            replacement.call(model);
            for (int i = 0; i < 100; ++i) {
                if (!replacement.call(7)) replacement.owns(7, busy);
                replacement.use(page);
            }
        }
        return std::array{replacement.worth(replacement.take_in(1), 1),
                          replacement.worth(replacement.take_in(3), 1),
                          replacement.worth(replacement.take_in(2), 1)};
    };
    const auto [hot, busy, cold] = rates(2000);
    CHECK(hot > 0.5 && busy > 0.5 && cold > 0 && cold < 0.01);
}

TEST(uses_are_recorded) {
    BufferPool pool(4 * page_size());
    static_cast<void>(pool.insert(1, make_page(1)));
    pool.record(3);
    pool.call(5);
    static_cast<void>(pin_one(pool, 1));
    static_cast<void>(pool.insert(2, make_page(1)));
    static_cast<void>(pool.insert(3, make_page(1), true));  // ahead of its use
    CHECK(pool.recorded().complete);
    pool.call(6);
    static_cast<void>(pin_one(pool, 3));
    static_cast<void>(pin_one(pool, 1));
    CHECK(pool.stats().hits == 2 && pool.stats().misses == 1);  // what came ahead was missed once
    static_cast<void>(pin_one(pool, 3));
    CHECK(pool.stats().hits == 3 && pool.stats().misses == 1);
    const BufferPool::Trace trace = pool.recorded();
    CHECK(trace.pages == (std::vector<PageId>{1, 2, 3}) && !trace.complete);
    CHECK(trace.calls == (std::vector<std::uint32_t>{1, 1, 2}));
    CHECK(trace.owners == (std::vector<std::int64_t>{5, 6}));
    CHECK(trace.bytes == std::vector<std::uint32_t>(3, static_cast<std::uint32_t>(page_size())));
}

TEST(pages_come_again_that_are_not_remembered_any_more) {
    for (const auto policy : {ReplacementPolicy::reuse, ReplacementPolicy::lru2}) {
        BufferPool pool(3 * page_size(), policy);
        for (int round = 0; round < 3; ++round) {
            for (PageId id = 1; id <= 2500; ++id) {  // more than twice what is remembered
                static_cast<void>(pool.insert(id, make_page(1)));
            }
        }
        CHECK(pool.stats().pages == 3 && pool.stats().evictions == 3 * 2500 - 3);
    }
}

}  // namespace

PYDEDUP_TEST_MAIN
