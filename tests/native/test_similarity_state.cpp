// SPDX-License-Identifier: Apache-2.0
// The index when memory runs out: whichever allocation of an add or a merge fails, nothing has been
// added, and the index answers as before. And its lock: a writer does not wait for readers that
// came later. What blocks hash to is tested elsewhere.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "pydedup/similarity.hpp"
#include "similarity/index.hpp"

namespace {

constexpr long kNever = -1;
// How many more allocations succeed.
std::atomic<long> left{kNever};

void* allocate(std::size_t bytes) {
    long before = left.load();
    while (before > 0 && !left.compare_exchange_weak(before, before - 1)) {
    }
    if (before == 0) throw std::bad_alloc();
    void* memory = std::malloc(bytes == 0 ? 1 : bytes);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

}  // namespace

void* operator new(std::size_t bytes) { return allocate(bytes); }
void* operator new[](std::size_t bytes) { return allocate(bytes); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using namespace pydedup;

constexpr std::size_t kRows = 2;
constexpr std::size_t kCols = 4;
// Two pieces of an add; the tables grow in both.
constexpr std::size_t kBefore = 1000;
constexpr std::size_t kAdded = 8000;

std::vector<float> random_blocks(std::size_t count) {
    std::vector<float> values(count * kRows * kCols);
    for (std::size_t i = 0; i < values.size(); ++i) {
        const std::uint64_t word = similarity::random_word(7, i);
        values[i] = static_cast<float>(word >> 40) - 8'388'608.0F;
    }
    return values;
}

std::vector<std::int64_t> ids_from(std::int64_t first, std::size_t count) {
    std::vector<std::int64_t> ids(count);
    for (std::size_t i = 0; i < count; ++i) ids[i] = first + static_cast<std::int64_t>(i);
    return ids;
}

BlockBatch batch_of(const float* values, std::size_t count) {
    return dense_blocks(reinterpret_cast<const std::byte*>(values), count, kRows, kCols,
                        Dtype::f32);
}

bool finds_all(const L2Index& index, const BlockBatch& blocks,
               const std::vector<std::int64_t>& expected) {
    std::vector<std::int64_t> ids(blocks.count);
    std::vector<double> distances(blocks.count);
    index.query(blocks, 1, ids, distances, 1);
    return ids == expected;
}

// True when the change went through.
template <class Change>
bool succeeds_with(long allocations, const Change& change) {
    left = allocations;
    try {
        change();
    } catch (const std::bad_alloc&) {
        left = kNever;
        return false;
    }
    left = kNever;
    return true;
}

TEST(an_add_that_fails_adds_nothing) {
    const std::vector<float> values = random_blocks(kBefore + kAdded);
    const BlockBatch before = batch_of(values.data(), kBefore);
    const BlockBatch added = batch_of(values.data() + kBefore * kRows * kCols, kAdded);
    const std::vector<std::int64_t> ids_before = ids_from(0, kBefore);
    const std::vector<std::int64_t> ids_added = ids_from(kBefore, kAdded);
    bool done = false;
    long failures = 0;
    for (long allocations = 0; !done; ++allocations) {
        L2Index index({Dtype::f32, kRows, kCols, 0.5, 4, 4, 1});
        index.add(before, ids_before, 1);
        const std::vector<std::byte> saved = index.save();
        done = succeeds_with(allocations, [&] { index.add(added, ids_added, 1); });
        if (done) break;
        ++failures;
        CHECK(index.size() == kBefore);
        CHECK(index.save() == saved);
        CHECK(finds_all(index, before, ids_before));
        index.add(added, ids_added, 1);  // and once there is memory again
        CHECK(finds_all(index, added, ids_added));
        index.remove(ids_added);
        CHECK(index.save() == saved);
    }
    CHECK(failures > 20);
}

TEST(a_merge_that_fails_adds_nothing) {
    // What is not finite came last, and asked for memory when all else was in the index already.
    std::vector<float> values = random_blocks(kBefore + kAdded);
    values.back() = std::numeric_limits<float>::infinity();
    const BlockBatch before = batch_of(values.data(), kBefore);
    const BlockBatch added = batch_of(values.data() + kBefore * kRows * kCols, kAdded);
    const LshParameters parameters{Dtype::f32, kRows, kCols, 0.5, 4, 4, 1};
    L2Index other(parameters);
    other.add(added, ids_from(kBefore, kAdded), 1);
    bool done = false;
    long failures = 0;
    for (long allocations = 0; !done; ++allocations) {
        L2Index index(parameters);
        index.add(before, ids_from(0, kBefore), 1);
        const std::vector<std::byte> saved = index.save();
        done = succeeds_with(allocations, [&] { index.merge(other, 1); });
        if (done) break;
        ++failures;
        CHECK(index.size() == kBefore);
        CHECK(index.save() == saved);
        CHECK(finds_all(index, before, ids_from(0, kBefore)));
        index.merge(other, 1);
        CHECK(index.size() == kBefore + kAdded);
        index.remove(ids_from(kBefore, kAdded));
        CHECK(index.save() == saved);
    }
    CHECK(failures > 10);
}

TEST(a_writer_goes_before_readers_that_come_later) {
    using namespace std::chrono_literals;
    similarity::FairMutex mutex;
    std::string order;  // written under the lock, by readers one after another
    std::atomic<int> arrived{0};
    const auto wait_for = [&](int count) {
        while (arrived < count) std::this_thread::yield();
        std::this_thread::sleep_for(100ms);  // from arriving to waiting
    };
    mutex.lock_shared();
    std::thread writer([&] {
        ++arrived;
        mutex.lock();
        order += 'w';
        mutex.unlock();
    });
    wait_for(1);
    std::thread reader([&] {
        ++arrived;
        mutex.lock_shared();
        order += 'r';
        mutex.unlock_shared();
    });
    wait_for(2);
    CHECK(order.empty());
    mutex.unlock_shared();
    writer.join();
    reader.join();
    CHECK(order == "wr");
}

TEST(readers_do_not_wait_for_each_other) {
    similarity::FairMutex mutex;
    mutex.lock_shared();
    std::thread reader([&] {
        mutex.lock_shared();
        mutex.unlock_shared();
    });
    reader.join();  // or the test times out
    mutex.unlock_shared();
    mutex.lock();
    mutex.unlock();
}

}  // namespace

PYDEDUP_TEST_MAIN
