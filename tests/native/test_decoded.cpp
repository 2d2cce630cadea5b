// SPDX-License-Identifier: Apache-2.0
// Decoded blocks in the buffer pool: what is kept, that it is the same, that it never takes what
// pages need, and many threads at once.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "check.hpp"
#include "pydedup/buffer_pool.hpp"
#include "pydedup/decoded.hpp"

using namespace pydedup;

namespace {

using PageId = BufferPool::PageId;

constexpr std::uint32_t kRows = 64;
constexpr std::uint32_t kCols = 64;
constexpr std::size_t kRaw = std::size_t{kRows} * kCols * 4;
constexpr std::size_t kBlocks = 3;  // of a page; the second one is raw

std::vector<float> elements(std::uint32_t tag) {
    std::vector<float> values(std::size_t{kRows} * kCols);
    for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = static_cast<float>((i * 37 + tag) % 11);
    }
    return values;
}

Page make_page(std::uint32_t tag) {
    std::vector<std::vector<std::byte>> bytes(kBlocks, std::vector<std::byte>(kRaw));
    std::vector<BlockView> blocks;
    for (std::uint32_t i = 0; i < kBlocks; ++i) {
        const std::vector<float> values = elements(tag + i);
        const MatrixRef matrix{reinterpret_cast<const std::byte*>(values.data()), kRows, kCols,
                               kCols * 4, Dtype::f32};
        const EncodedBlock encoded = encode_block(matrix, i != 1, bytes[i]);
        blocks.push_back(
            {bytes[i].data(), encoded.length, encoded.encoding, Dtype::f32, kRows, kCols, 0});
    }
    const std::size_t size = page_bytes(blocks);
    auto* const memory = new std::byte[size];
    build_page(blocks, {memory, size});
    return Page(std::shared_ptr<const std::byte>(memory, std::default_delete<const std::byte[]>()),
                size);
}

std::size_t page_size(std::uint32_t tag) { return make_page(tag).nbytes(); }

// Looks at a block of pages that are pinned, decodes it, and says whether it was kept decoded.
bool read(const BufferPool::PinnedPages& pinned, std::uint32_t page, std::uint32_t slot,
          std::uint32_t tag) {
    BlockView view;
    view_blocks(pinned.pages, {&page, 1}, {&slot, 1}, {&view, 1}, 1, pinned.decoded);
    const bool kept = view.encoding == Encoding::raw;
    constexpr std::size_t kApart = kCols + 3;  // elements from row to row
    std::vector<float> values(kRows * kApart);
    decode_block(view, reinterpret_cast<std::byte*>(values.data()), kApart * 4);
    const std::vector<float> want = elements(tag + slot);
    for (std::size_t row = 0; row < kRows; ++row) {
        CHECK(std::equal(want.begin() + row * kCols, want.begin() + (row + 1) * kCols,
                         values.begin() + row * kApart));
    }
    return kept;
}

BufferPool::Pins pin(BufferPool& pool, std::vector<PageId> ids) { return pool.pin_all(ids); }

bool reads_kept(BufferPool& pool, PageId id) {
    const auto pins = pin(pool, {id});
    return read(*pins, 0, 0, static_cast<std::uint32_t>(id));
}

TEST(encoded_blocks_are_kept_once_decoded_and_raw_ones_are_not) {
    BufferPool pool(1 << 20);
    static_cast<void>(pool.insert(1, make_page(1)));
    CHECK(decoded_bytes(make_page(1).view()) == 2 * kRaw);
    CHECK(pool.stats().decoded_bytes == 0);
    {
        const auto pins = pin(pool, {1});
        CHECK(pool.stats().decoded_bytes == 2 * kRaw);
        CHECK(pool.stats().bytes == page_size(1) + 2 * kRaw);
        CHECK(pool.stats().pinned_bytes == page_size(1) + 2 * kRaw);
        for (std::uint32_t slot = 0; slot < kBlocks; ++slot) {
            CHECK(read(*pins, 0, slot, 1) == (slot == 1));
            CHECK(read(*pins, 0, slot, 1));
        }
    }
    CHECK(pool.stats().pinned_bytes == 0 && pool.stats().decoded_bytes == 2 * kRaw);
    CHECK(reads_kept(pool, 1));
    const PageId id = 1;
    pool.drop({&id, 1});
    CHECK(pool.stats().bytes == 0 && pool.stats().decoded_bytes == 0);
}

TEST(a_page_without_encoded_blocks_has_nothing_decoded) {
    const std::vector<float> values = elements(5);
    const BlockView block{reinterpret_cast<const std::byte*>(values.data()),
                          kRaw,
                          Encoding::raw,
                          Dtype::f32,
                          kRows,
                          kCols,
                          0};
    const std::size_t size = page_bytes({&block, 1});
    auto* const memory = new std::byte[size];
    build_page({&block, 1}, {memory, size});
    BufferPool pool(1 << 20);
    static_cast<void>(pool.insert(
        1, Page(std::shared_ptr<const std::byte>(memory, std::default_delete<const std::byte[]>()),
                size)));
    CHECK(pin(pool, {1})->decoded[0] == nullptr);
    CHECK(pool.stats().decoded_bytes == 0);
}

TEST(decoded_blocks_never_make_a_page_go_and_go_before_any) {
    // Two pages and what one of them decodes to.
    BufferPool pool(page_size(1) + page_size(2) + 2 * kRaw);
    static_cast<void>(pool.insert(1, make_page(1)));
    static_cast<void>(pool.insert(2, make_page(2)));
    CHECK(!reads_kept(pool, 1) && reads_kept(pool, 1));
    CHECK(!reads_kept(pool, 2) && !reads_kept(pool, 2));  // there is no room for both
    CHECK(pool.stats().evictions == 0 && pool.stats().decoded_bytes == 2 * kRaw);
    static_cast<void>(pool.insert(3, make_page(3)));
    CHECK(pool.stats().evictions == 0 && pool.stats().decoded_bytes == 0);
    CHECK(pool.stats().pages == 3);
}

TEST(what_was_not_used_for_many_predictions_makes_room) {
    BufferPool pool(page_size(1) + page_size(2) + 2 * kRaw);
    static_cast<void>(pool.insert(1, make_page(1)));
    static_cast<void>(pool.insert(2, make_page(2)));
    CHECK(!reads_kept(pool, 1));
    for (int call = 0; call < 255; ++call) pool.call(2);
    CHECK(!reads_kept(pool, 2) && reads_kept(pool, 1));  // it was used just now
    for (int call = 0; call < 256; ++call) pool.call(2);
    CHECK(!reads_kept(pool, 2) && reads_kept(pool, 2));
    for (int twice = 0; twice < 2; ++twice) CHECK(!reads_kept(pool, 1) && reads_kept(pool, 2));
    CHECK(pool.stats().decoded_bytes == 2 * kRaw);
}

TEST(a_page_that_is_dropped_while_its_blocks_are_read_stays_as_it_is) {
    BufferPool pool(1 << 20);
    static_cast<void>(pool.insert(1, make_page(1)));
    auto pins = pin(pool, {1});
    CHECK(!read(*pins, 0, 0, 1));
    pool.clear();
    CHECK(read(*pins, 0, 0, 1));
    CHECK(pool.stats().bytes == page_size(1) + 2 * kRaw);
    pins.reset();
    CHECK(pool.stats().bytes == 0 && pool.stats().decoded_bytes == 0);
}

TEST(who_needs_the_bytes_waits_for_the_reader) {
    BufferPool pool(page_size(1) + 2 * kRaw);
    static_cast<void>(pool.insert(1, make_page(1)));
    auto pins = pin(pool, {1});
    CHECK(!read(*pins, 0, 0, 1));
    std::atomic<bool> is_in{false};
    std::thread other([&] {
        static_cast<void>(pool.insert(2, make_page(2)));
        is_in = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(!is_in);
    CHECK(read(*pins, 0, 0, 1));
    pins.reset();
    other.join();
    CHECK(is_in && pool.stats().decoded_bytes == 0 && pool.stats().evictions == 0);
    // So for pages.
    auto held = pool.reserve(2 * kRaw - page_size(2));
    pins = pin(pool, {1, 2});
    CHECK(pins->decoded[0] == nullptr);
    is_in = false;
    std::thread third([&] {
        static_cast<void>(pool.insert(3, make_page(3)));
        is_in = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(!is_in);
    pins.reset();
    third.join();
    CHECK(is_in && pool.stats().evictions > 0);
    // Pages that are pinned for longer are not waited for.
    const std::vector<PageId> all{1, 2, 3};
    std::vector<BufferPool::Pin> long_pins(3);
    pool.pin(all, long_pins);
    held.reset();
    held = pool.reserve(pool.stats().budget_bytes - pool.stats().pinned_bytes);
    pins = pin(pool, {3});
    CHECK(pins != nullptr);
    CHECK_THROWS(ErrorCode::out_of_budget, static_cast<void>(pool.insert(4, make_page(4))));
}

TEST(many_threads_read_right_and_the_budget_is_kept) {
    const std::size_t budget = 4 * page_size(1) + 5 * kRaw;
    BufferPool pool(budget);
    std::atomic<int> kept{0};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 4; ++t) {
        threads.emplace_back([&, t] {
            std::uint32_t state = t + 1;
            for (int turn = 0; turn < 2000; ++turn) {
                state = state * 1664525 + 1013904223;
                const PageId id = 1 + (state >> 16) % 5;
                auto pins = pin(pool, {id});
                if (!pins) {
                    static_cast<void>(pool.insert(id, make_page(static_cast<std::uint32_t>(id))));
                    continue;
                }
                const auto slot = static_cast<std::uint32_t>(turn % 3);
                const bool raw = read(*pins, 0, slot, static_cast<std::uint32_t>(id));
                if (raw && slot != 1) ++kept;
                if (turn % 64 == 0) pool.call(id);
                if (pool.stats().bytes > budget) kept = -1000000;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(kept > 0);
    CHECK(pool.stats().pinned_bytes == 0 && pool.stats().bytes <= budget);
    pool.clear();
    CHECK(pool.stats().bytes == 0 && pool.stats().decoded_bytes == 0);
}

}  // namespace

PYDEDUP_TEST_MAIN
