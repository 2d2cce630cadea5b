// SPDX-License-Identifier: Apache-2.0
// Whatever reads blocks reads deltas with their bases, to the same bits as raw blocks, and refuses
// bases that are missing, wrong or deltas themselves. (The encodings: test_delta.cpp.)
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "check.hpp"
#include "gemm_reference.hpp"
#include "pydedup/conv.hpp"
#include "pydedup/gemm.hpp"
#include "pydedup/page_content.hpp"
#include "pydedup/page_format.hpp"
#include "pydedup/row_table.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

constexpr std::int64_t kPage = 5;
constexpr std::int64_t kBasePage = 9;

template <class T>
std::byte* bytes_of(std::vector<T>& values) {
    return reinterpret_cast<std::byte*>(values.data());
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

Page page_of(const std::vector<BlockView>& blocks) {
    const std::size_t size = page_bytes(blocks);
    const std::shared_ptr<std::byte> memory(new std::byte[size],
                                            [](const std::byte* p) { delete[] p; });
    build_page(blocks, {memory.get(), size});
    return {memory, size};
}

// A matrix of f32 on one page, every other block a delta on the same block of another matrix, which
// is f64, compressed in parts, and on a page of its own. Both matrices whole as well.
struct Family {
    BlockGrid grid{50, 54, 16, 12};
    std::vector<double> base = normal<double>(grid.rows * grid.cols);
    std::vector<float> w;
    std::vector<std::int64_t> indices, page_ids, base_page_ids;
    std::vector<StoredBlock> stored, bases;  // pages: the matrix's, the base's
    std::vector<std::uint32_t> slots, base_slots;
    std::vector<BlockView> raw;  // of w, in memory of `kept`
    std::vector<BlockView> base_views, views;
    std::vector<Page> pages;
    std::vector<const Page*> list;

    Family() {
        for (std::size_t i = 0; i < base.size(); ++i) {
            if (i % 40 < 20) base[i] = 0;  // compresses
            const auto rounded = static_cast<float>(base[i]);
            w.push_back(i % 7 == 0 ? rounded + 0.01F : rounded);
        }
        std::vector<BlockView> on_page;
        std::vector<BlockView> on_base_page;
        for (std::size_t i = 0; i < grid.count(); ++i) {
            const MatrixRef block = part(w, Dtype::f32, i);
            const MatrixRef of_base = part(base, Dtype::f64, i);
            raw.push_back(encoded(block, false));
            on_base_page.push_back(encoded(of_base, true));
            const bool is_delta = i % 2 == 0;
            on_page.push_back(is_delta ? delta(block, of_base) : raw.back());
            const auto slot = static_cast<std::uint32_t>(i);
            indices.push_back(static_cast<std::int64_t>(i));
            page_ids.push_back(kPage);
            slots.push_back(slot);
            base_page_ids.push_back(is_delta ? kBasePage : -1);
            base_slots.push_back(is_delta ? slot : 0);
            stored.push_back({0, slot});
            bases.push_back({is_delta ? 1 : kNoPage, is_delta ? slot : 0});
        }
        pages.push_back(page_of(on_page));
        pages.push_back(page_of(on_base_page));
        list = {&pages[0], &pages[1]};
        base_views.resize(grid.count());
        for (std::size_t i = 0; i < grid.count(); ++i) {
            views.push_back(with_base(pages[0].block(i), {list, bases}, i, base_views[i]));
        }
    }
    Family(const Family&) = delete;
    Family& operator=(const Family&) = delete;

    template <class T>
    [[nodiscard]] MatrixRef part(const std::vector<T>& values, Dtype dtype, std::size_t i) const {
        const BlockRect rect = block_rect(grid, i);
        return {
            reinterpret_cast<const std::byte*>(values.data() + rect.row0 * grid.cols + rect.col0),
            rect.rows, rect.cols, grid.cols * sizeof(T), dtype};
    }

    BlockView encoded(const MatrixRef& block, bool planes) {
        std::vector<std::byte>& memory = room(block);
        const EncodedBlock how = encode_block(block, planes, memory);
        return view(block, memory, how, 0);
    }

    BlockView delta(const MatrixRef& block, const MatrixRef& of_base) {
        std::vector<std::byte>& memory = room(block);
        const auto how = encode_delta(block, of_base, {}, memory);
        CHECK(how.has_value());
        return view(block, memory, *how, 1);
    }

    std::vector<std::byte>& room(const MatrixRef& block) {
        kept_.push_back(std::make_unique<std::vector<std::byte>>(block.rows * block.cols *
                                                                 item_bytes(block.dtype)));
        return *kept_.back();
    }

    static BlockView view(const MatrixRef& block, const std::vector<std::byte>& memory,
                          EncodedBlock how, std::uint64_t tag) {
        return {memory.data(),
                how.length,
                how.encoding,
                block.dtype,
                static_cast<std::uint32_t>(block.rows),
                static_cast<std::uint32_t>(block.cols),
                tag};
    }

  private:
    std::vector<std::unique_ptr<std::vector<std::byte>>> kept_;
};

std::vector<float> multiply(const Family& family, const std::vector<BlockView>& blocks,
                            const std::vector<float>& x, std::size_t m, bool transpose,
                            unsigned threads, std::size_t piece) {
    std::vector<float> y(m * (transpose ? family.grid.cols : family.grid.rows));
    Matmul matmul({family.grid, Dtype::f32, reinterpret_cast<const std::byte*>(x.data()), m,
                   nullptr, Activation::none, transpose, bytes_of(y), threads});
    for (std::size_t at = 0; at < blocks.size(); at += piece) {
        matmul.feed(std::span(blocks).subspan(at, std::min(piece, blocks.size() - at)));
    }
    return y;
}

TEST(products_and_convolutions_are_those_of_raw_blocks) {
    const Family family;
    for (const bool transpose : {false, true}) {
        for (const std::size_t m : {1U, 5U, 40U}) {
            const auto x = normal<float>(m * (transpose ? family.grid.rows : family.grid.cols));
            const auto want = multiply(family, family.raw, x, m, transpose, 1, 1000);
            CHECK(same_bits(want, multiply(family, family.views, x, m, transpose, 1, 1000)));
            CHECK(same_bits(want, multiply(family, family.views, x, m, transpose, 3, 7)));
        }
    }
    const ConvShape shape{2, 6, 7, 8, 50, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const auto x = normal<float>(2 * 6 * 7 * 8);
    std::vector<std::vector<float>> results;
    for (const auto* blocks : {&family.raw, &family.views}) {
        auto& y = results.emplace_back(2 * 50 * shape.out_h() * shape.out_w());
        Conv2d conv({family.grid, Dtype::f32, shape, reinterpret_cast<const std::byte*>(x.data()),
                     nullptr, Activation::none, bytes_of(y), 2});
        conv.feed(*blocks);
    }
    CHECK(same_bits(results[0], results[1]));
}

TEST(matrices_digests_and_comparisons) {
    const Family family;
    const std::size_t n = family.grid.count();
    const StoredBases bases{family.list, family.bases};
    const auto pages = std::span<const Page* const>(family.list);
    const MatrixRef matrix{reinterpret_cast<const std::byte*>(family.w.data()), family.grid.rows,
                           family.grid.cols, family.grid.cols * 4, Dtype::f32};
    for (const unsigned threads : {1U, 3U}) {
        std::vector<float> out(family.w.size(), -1.0F);
        read_blocks(pages, family.stored, bases, family.indices, family.grid, Dtype::f32,
                    bytes_of(out), family.grid.cols * 4, threads);
        CHECK(same_bits(out, family.w));
        const std::unique_ptr<bool[]> equal(new bool[n]{});
        blocks_equal(pages, family.stored, bases, family.indices, matrix, family.grid,
                     {equal.get(), n}, threads);
        for (std::size_t i = 0; i < n; ++i) CHECK(equal[i]);
        std::vector<Digest> digests(n);
        std::vector<Digest> wanted(n);
        block_digests(family.views, digests, threads);
        block_digests(family.raw, wanted, threads);
        CHECK(digests == wanted);
    }
    for (std::size_t i = 0; i < n; ++i) {
        CHECK(same_block(family.views[i], family.raw[i]));
        CHECK(!same_block(family.views[i], family.base_views[i]));
    }
    std::vector<Digest> digests(n);
    CHECK_THROWS(ErrorCode::corrupt_page, page_digests(family.pages[0], digests));
    page_digests(family.pages[1], digests);
    CHECK_THROWS(ErrorCode::invalid_argument,
                 block_digests(family.views, std::span(digests).first(1)));
    const auto one_less = std::span(family.bases).first(n - 1);
    std::vector<float> out(family.w.size());
    CHECK_THROWS(ErrorCode::invalid_argument,
                 read_blocks(pages, family.stored, {family.list, one_less}, family.indices,
                             family.grid, Dtype::f32, bytes_of(out), family.grid.cols * 4));
}

std::unique_ptr<RowTable> table_of(const Family& family) {
    return std::make_unique<RowTable>(family.grid, Dtype::f32, family.page_ids, family.slots,
                                      family.base_page_ids, family.base_slots);
}

std::vector<float> rows_of(const Family& family, std::span<const std::int64_t> ids) {
    std::vector<float> rows;
    for (const std::int64_t id : ids) {
        const auto at = family.w.begin() + static_cast<std::ptrdiff_t>(id) * 54;
        rows.insert(rows.end(), at, at + 54);
    }
    return rows;
}

TEST(rows_come_from_both_pages_or_from_blocks) {
    const Family family;
    const auto table = table_of(family);
    const std::vector<std::int64_t> ids = {49, 0, 17, 17, 31};
    const std::vector<std::int64_t> page_ids = {kPage, kBasePage};
    CHECK(table->pages_of(ids) == page_ids);
    std::vector<float> out(ids.size() * 54, -1.0F);
    table->take(page_ids, family.list, ids, bytes_of(out));
    CHECK(same_bits(out, rows_of(family, ids)));
    // A delta whose base's page is not there is no piece to leave out: nobody would do it later.
    const std::vector<std::int64_t> first = {kPage};
    CHECK_THROWS(ErrorCode::invalid_argument,
                 table->take(first, std::span(family.list).first(1), ids, bytes_of(out)));
    // Some blocks at a time, in any order; each call does its part.
    const std::vector<std::int64_t> edges = {0, 2, 2, 5};
    std::fill(out.begin(), out.end(), -1.0F);
    std::vector<float> tops(3 * 54, -1e30F);
    for (std::size_t odd = 0; odd < 2; ++odd) {
        std::vector<std::int64_t> numbers;
        std::vector<BlockView> views;
        for (std::size_t i = family.grid.count(); i-- > 0;) {
            if (i / 3 % 2 != odd) continue;
            numbers.push_back(static_cast<std::int64_t>(i));
            views.push_back(family.views[i]);
        }
        table->take(numbers, views, ids, bytes_of(out), 2);
        Bags bags(ids, edges);
        table->bag(numbers, views, bags, BagMode::max, bytes_of(tops), 2);
    }
    CHECK(same_bits(out, rows_of(family, ids)));
    std::vector<float> want(3 * 54, -1e30F);
    for (std::size_t i = 0; i < ids.size(); ++i) {
        for (std::size_t c = 0; c < 54; ++c) {
            float& top = want[(i < 2 ? 0 : 2) * 54 + c];
            top = std::max(top, out[i * 54 + c]);
        }
    }
    CHECK(same_bits(tops, want));
    const std::vector<std::int64_t> behind = {static_cast<std::int64_t>(family.grid.count())};
    const auto views = std::span<const BlockView>(family.views);
    CHECK_THROWS(ErrorCode::invalid_argument,
                 table->take(behind, views.first(1), ids, bytes_of(out)));
    CHECK_THROWS(ErrorCode::invalid_argument,
                 table->take(behind, views.first(2), ids, bytes_of(out)));
    const std::vector<std::int64_t> misplaced = {static_cast<std::int64_t>(family.grid.count()) -
                                                 1};
    CHECK_THROWS(ErrorCode::corrupt_page,
                 table->take(misplaced, views.first(1), ids, bytes_of(out)));
}

TEST(a_table_wants_a_base_for_each_block_or_none) {
    const Family family;
    const auto some = std::span<const std::int64_t>(family.base_page_ids).first(3);
    CHECK_THROWS(ErrorCode::invalid_argument, RowTable(family.grid, Dtype::f32, family.page_ids,
                                                       family.slots, some, family.base_slots));
    CHECK_THROWS(ErrorCode::invalid_argument,
                 RowTable(family.grid, Dtype::f32, family.page_ids, family.slots, some,
                          std::span<const std::uint32_t>(family.base_slots).first(3)));
    // Without bases deltas are damage.
    const RowTable table(family.grid, Dtype::f32, family.page_ids, family.slots);
    const std::vector<std::int64_t> page_ids = {kPage};
    const std::vector<std::int64_t> ids = {0};
    std::vector<float> out(54);
    CHECK_THROWS(ErrorCode::corrupt_page,
                 table.take(page_ids, std::span(family.list).first(1), ids, bytes_of(out)));
}

TEST(bad_bases_are_refused) {
    const Family family;
    std::vector<float> x = normal<float>(54);
    const auto product = [&](const BlockView& block) {
        std::vector<BlockView> blocks = family.views;
        blocks[0] = block;
        static_cast<void>(multiply(family, blocks, x, 1, false, 2, 1000));
    };
    product(family.views[0]);
    BlockView block = family.views[0];
    block.base_block = nullptr;
    CHECK_THROWS(ErrorCode::corrupt_page, product(block));
    block.base_block = &family.views[0];  // a delta
    CHECK_THROWS(ErrorCode::corrupt_page, product(block));
    block.base_block = &block;  // itself
    CHECK_THROWS(ErrorCode::corrupt_page, product(block));
    block.base_block = &family.base_views[2];  // another block of the right shape
    CHECK_THROWS(ErrorCode::corrupt_page, product(block));
    block.base_block = &family.raw[0];  // of another dtype
    CHECK_THROWS(ErrorCode::corrupt_page, product(block));
    block.base_block = &family.base_views[4];  // of another shape
    CHECK_THROWS(ErrorCode::corrupt_page, product(block));
    // Places that are not there.
    const auto found = [&](StoredBlock at, std::span<const Page* const> pages) {
        BlockView base{};
        const std::vector<StoredBlock> bases = {at};
        return with_base(family.pages[0].block(0), {pages, bases}, 0, base).base_block == &base;
    };
    CHECK(found({1, 0}, family.list));
    CHECK(!found({kNoPage, 0}, family.list));
    CHECK_THROWS(ErrorCode::invalid_argument, found({2, 0}, family.list));
    CHECK_THROWS(ErrorCode::corrupt_page, found({1, 1000}, family.list));
    const std::vector<const Page*> holes = {family.list[0], nullptr};
    CHECK_THROWS(ErrorCode::invalid_argument, found({1, 0}, holes));
}

TEST(many_threads_read_one_table) {
    const Family family;
    const auto table = table_of(family);
    const std::vector<std::int64_t> page_ids = {kPage, kBasePage};
    std::vector<std::int64_t> ids;
    for (std::int64_t i = 0; i < 50; ++i) ids.push_back(i * 7 % 50);
    const auto want = rows_of(family, ids);
    std::vector<int> wrong(4, 0);
    std::vector<std::thread> users;
    for (int& mine : wrong) {
        users.emplace_back([&] {
            for (int round = 0; round < 20; ++round) {
                std::vector<float> out(want.size());
                table->take(page_ids, family.list, ids, bytes_of(out), 2);
                mine += same_bits(out, want) ? 0 : 1;
            }
        });
    }
    for (std::thread& user : users) user.join();
    for (const int mine : wrong) CHECK(mine == 0);
}

}  // namespace

PYDEDUP_TEST_MAIN
