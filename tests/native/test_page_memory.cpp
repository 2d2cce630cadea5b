// SPDX-License-Identifier: Apache-2.0
// Memory for pages: apart from each other, aligned, used again, on many threads and after a fork.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "check.hpp"
#include "pydedup/page_memory.hpp"

using namespace pydedup;

namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

using Memory = std::shared_ptr<std::byte>;

// Whether all bytes are still those that were written when it was taken.
bool holds(const Memory& memory, std::size_t size, int value) {
    return std::all_of(memory.get(), memory.get() + size,
                       [value](std::byte byte) { return byte == static_cast<std::byte>(value); });
}

TEST(places_are_apart_and_aligned) {
    const std::size_t sizes[] = {kMiB, kMiB * 3 / 4, kMiB - 1, 2 * kMiB, 5 * kMiB + 1};
    std::vector<Memory> taken;
    std::vector<std::size_t> size_of;
    for (int i = 0; i < 40; ++i) {
        const std::size_t size = sizes[i % 5];
        taken.push_back(page_memory(size));
        size_of.push_back(size);
        if (!taken.back()) return;  // not a system with such memory
        CHECK(reinterpret_cast<std::uintptr_t>(taken.back().get()) % 64 == 0);
        std::memset(taken.back().get(), i, size);
    }
    for (int i = 0; i < 40; i += 3) taken[i].reset();
    for (int i = 0; i < 40; i += 3) {
        taken[i] = page_memory(size_of[i]);
        CHECK(taken[i] != nullptr);
        std::memset(taken[i].get(), i, size_of[i]);
    }
    for (int i = 0; i < 40; ++i) CHECK(holds(taken[i], size_of[i], i));
}

TEST(what_was_given_back_is_used_again) {
    Memory keeps_the_region = page_memory(kMiB);
    if (!keeps_the_region) return;
    Memory one = page_memory(kMiB);
    const std::byte* const place = one.get();
    one.reset();
    one = page_memory(kMiB);
    CHECK(one.get() == place);
}

TEST(sizes_that_would_waste_memory_are_left_to_the_caller) {
    CHECK(!page_memory(0));
    CHECK(!page_memory(kMiB * 3 / 4 - 1));
    CHECK(!page_memory(kMiB + 1));
    CHECK(!page_memory(2 * kMiB - 1));
    CHECK(!page_memory(static_cast<std::size_t>(-1)));
    CHECK(!page_memory(static_cast<std::size_t>(-1) / 2));
}

TEST(any_size_gets_memory_of_one_kind_or_another) {
    for (const std::size_t size :
         {std::size_t{0}, std::size_t{1}, kMiB / 2, kMiB, kMiB + 1, 3 * kMiB}) {
        const Memory memory = any_page_memory(size);
        CHECK(memory != nullptr);
        CHECK(reinterpret_cast<std::uintptr_t>(memory.get()) % 64 == 0);
        std::memset(memory.get(), 7, size);
        CHECK(holds(memory, size, 7));
    }
}

TEST(many_threads) {
    std::vector<std::thread> threads;
    std::vector<int> damaged(4);
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([t, &damaged] {
            std::vector<Memory> taken;
            for (int round = 0; round < 60; ++round) {
                if (Memory memory = page_memory(kMiB)) {
                    std::memset(memory.get(), t, 4096);
                    taken.push_back(std::move(memory));
                }
                if (round % 3 == 2) taken.erase(taken.begin());
            }
            for (const Memory& memory : taken) damaged[t] += holds(memory, 4096, t) ? 0 : 1;
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(std::all_of(damaged.begin(), damaged.end(), [](int n) { return n == 0; }));
}

TEST(a_forked_child_keeps_what_it_has) {
    Memory before = page_memory(kMiB);
    if (!before) return;
    std::memset(before.get(), 7, kMiB);
    const pid_t child = fork();
    if (child == 0) {
        Memory own = page_memory(kMiB);
        if (!own || own.get() == before.get()) _exit(1);
        std::memset(own.get(), 9, kMiB);
        const bool kept = holds(before, kMiB, 7);
        before.reset();
        _exit(kept && holds(own, kMiB, 9) ? 0 : 2);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(holds(before, kMiB, 7));
}

// GCC 12's address sanitizer leaves its own allocator locked in a child of a process with threads.
#if !defined(__SANITIZE_ADDRESS__)
TEST(a_child_that_is_forked_while_others_take_places_waits_for_none) {
    Memory before = page_memory(kMiB);
    if (!before) return;
    std::atomic<bool> stop{false};
    std::vector<std::jthread> threads;
    for (int i = 0; i < 2; ++i) {
        threads.emplace_back([&] {
            while (!stop) static_cast<void>(page_memory(kMiB));
        });
    }
    bool all_left = true;
    for (int round = 0; round < 100 && all_left; ++round) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(20);  // a deadlock becomes a signal
            before.reset();
            _exit(page_memory(kMiB) ? 0 : 1);
        }
        int status = -1;
        waitpid(child, &status, 0);
        all_left = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }
    stop = true;
    CHECK(all_left);
}
#endif

}  // namespace

PYDEDUP_TEST_MAIN
