// SPDX-License-Identifier: Apache-2.0
// Deltas on moved bases, several together: pages have a factor of several blocks once, damaged ones
// are refused or decode, and batches are alike for any number of threads.
#include <algorithm>
#include <optional>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "check.hpp"
#include "codec/low_rank.hpp"
#include "low_rank_deltas.hpp"
#include "pydedup/error.hpp"
#include "pydedup/page_format.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

// Deltas with factors in common: of one row of blocks, each with columns of its own, and then of
// another row with the same columns; with raw blocks and bases in between.
struct Sample {
    std::vector<Buffer> bases, contents;
    std::vector<Encoded> deltas;
    std::vector<BlockView> views;
};

Sample sample(std::size_t rows, std::size_t cols, unsigned rank, std::int32_t largest) {
    std::mt19937_64 random(7);
    Sample all;
    std::vector<Factors> down, across;
    for (int i = 0; i < 2; ++i) {
        down.push_back(random_factors(rows, cols, rank, largest, -30, random));
        across.push_back(random_factors(rows, cols, rank, largest, -30, random));
    }
    for (const auto& [i, j] : {std::pair{0, 0}, {0, 1}, {1, 0}, {1, 1}, {0, 0}}) {
        const Factors factors{rank, -30, down[static_cast<std::size_t>(i)].of_rows,
                              across[static_cast<std::size_t>(j)].of_cols};
        const std::optional<double> bound = i == 1 ? std::optional(1e-3) : std::nullopt;
        all.bases.push_back(as_dtype(normal(rows * cols, 0.02, random), Dtype::f32));
        const Buffer block = changed(moved_by(factors, all.bases.back(), rows, cols, Dtype::f32),
                                     Dtype::f32, Change::few, random);
        all.deltas.push_back(encode(matrix(block, rows, cols, Dtype::f32),
                                    matrix(all.bases.back(), rows, cols, Dtype::f32), factors,
                                    bound));
        all.contents.push_back(
            decode(all.deltas.back(), view(all.bases.back(), rows, cols, Dtype::f32), Dtype::f32));
    }
    for (std::size_t i = 0; i < all.deltas.size(); ++i) {
        if (i % 2 == 1) all.views.push_back(view(all.bases[i], rows, cols, Dtype::f32));
        all.views.push_back(
            view(all.deltas[i].bytes, rows, cols, Dtype::f32, all.deltas[i].encoding));
    }
    return all;
}

Buffer page_of(const std::vector<BlockView>& blocks) {
    Buffer page(page_bytes(blocks), 0xAA);
    build_page(blocks, {at(page), page.size()});
    return page;
}

std::vector<BlockView> blocks_on(const Buffer& page) {
    const PageView parsed = PageView::parse({at(page), page.size()});
    std::vector<BlockView> blocks;
    for (std::size_t slot = 0; slot < parsed.n_slots(); ++slot) {
        blocks.push_back(parsed.block(slot));
    }
    return blocks;
}

Buffer alone(const BlockView& block) {
    Buffer bytes(encoded_bytes(block));
    copy_encoded(block, {at(bytes), bytes.size()});
    return bytes;
}

// That a page holds these blocks, and each comes off it as it was.
void check_page(const Buffer& page, const std::vector<BlockView>& of) {
    const std::vector<BlockView> blocks = blocks_on(page);
    CHECK(blocks.size() == of.size());
    for (std::size_t i = 0; i < of.size(); ++i) {
        CHECK(has_factors(blocks[i]) == has_factors(of[i]));
        CHECK(alone(blocks[i]) == alone(of[i]));
    }
    CHECK(page_of(blocks) == page);  // taken from it and put there again
}

TEST(a_page_has_a_factor_of_several_blocks_once) {
    const Sample all = sample(64, 48, 8, 5000);
    const Buffer page = page_of(all.views);
    check_page(page, all.views);
    const std::vector<BlockView> blocks = blocks_on(page);
    std::vector<std::uint32_t> saved;
    std::size_t next = 0;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
        if (!is_delta(blocks[i].encoding)) continue;
        saved.push_back(all.views[i].length - blocks[i].length);
        Buffer out(64 * 48 * 4);
        const BlockView base = view(all.bases[next], 64, 48, Dtype::f32);
        decode_delta(blocks[i], base, at(out), 48 * 4);
        CHECK(out == all.contents[next]);
        ++next;
    }
    const std::uint32_t rows = 8 + 64 * 8 * 14 / 8;
    const std::uint32_t cols = 8 + 48 * 8 * 14 / 8;
    const auto is_about = [](std::uint32_t got, std::uint32_t want) {
        return got <= want && got + 6 >= want;  // what says where takes up to 3 bytes each
    };
    CHECK(saved[0] == 0);
    CHECK(is_about(saved[1], rows));
    CHECK(is_about(saved[2], cols));
    CHECK(is_about(saved[3], rows + cols));
    CHECK(is_about(saved[4], rows + cols));
}

TEST(pages_of_blocks_of_pages_are_those_of_the_blocks) {
    const Sample all = sample(64, 48, 8, 5000);
    const Buffer first = page_of(all.views);
    const std::vector<BlockView> on_page = blocks_on(first);
    std::mt19937_64 random(8);
    std::vector<std::size_t> order(all.views.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (int round = 0; round < 20; ++round) {
        std::shuffle(order.begin(), order.end(), random);
        const auto count = static_cast<std::ptrdiff_t>(1 + random() % order.size());
        std::vector<BlockView> some, same;
        for (auto i = order.begin(); i != order.begin() + count; ++i) {
            some.push_back(all.views[*i]);
            same.push_back(on_page[*i]);
        }
        const Buffer page = page_of(some);
        check_page(page, some);
        CHECK(page_of(same) == page);
        CHECK(page_bytes(same) == page.size());
    }
}

TEST(factors_of_few_bytes_are_in_every_block) {
    const Sample all = sample(400, 1, 1, 100);  // that of the column has 2 or 3 bytes
    const Buffer page = page_of(all.views);
    check_page(page, all.views);
    for (const BlockView& block : blocks_on(page)) {
        if (!is_delta(block.encoding)) continue;
        const auto places = detail::find_factors(block);
        CHECK(places && places->of_cols.size() <= 3);
        CHECK(places && places->of_cols.data() > block.data);
    }
}

TEST(a_factor_of_rows_may_be_that_of_columns) {
    std::mt19937_64 random(9);
    const Buffer base = as_dtype(normal(32 * 32, 0.02, random), Dtype::f32);
    Factors factors = random_factors(32, 32, 4, 3000, -30, random);
    factors.of_cols = factors.of_rows;
    const Buffer block = moved_by(factors, base, 32, 32, Dtype::f32);
    const Encoded delta =
        encode(matrix(block, 32, 32, Dtype::f32), matrix(base, 32, 32, Dtype::f32), factors);
    const BlockView once = view(delta.bytes, 32, 32, Dtype::f32, Encoding::delta);
    const Buffer page = page_of({once, once});
    check_page(page, {once, once});
    const std::vector<BlockView> blocks = blocks_on(page);
    CHECK(blocks[0].length == once.length);  // nothing within a block refers to it
    CHECK(blocks[1].length < 40);
    Buffer out(block.size());
    decode_delta(blocks[1], view(base, 32, 32, Dtype::f32), at(out), 32 * 4);
    CHECK(out == block);
}

// Decodes or is refused; nothing else, under ASan and UBSan.
bool is_handled(const BlockView& delta, const BlockView& base) {
    Buffer out(std::size_t{delta.rows} * delta.cols * item_bytes(delta.dtype));
    try {
        const Buffer bytes = alone(delta);
        std::vector<BlockView> one = {delta};
        if (!bytes.empty() && bytes.size() < out.size()) static_cast<void>(page_of(one));
        decode_delta(delta, base, at(out), delta.cols * item_bytes(delta.dtype));
        return true;
    } catch (const Error& error) {
        return error.code() == ErrorCode::corrupt_page ||
               error.code() == ErrorCode::unsupported_format ||
               error.code() == ErrorCode::invalid_argument;
    }
}

TEST(damaged_deltas_with_factors_are_refused_or_decode) {
    const Sample all = sample(16, 24, 3, 90);
    const Buffer page = page_of(all.views);
    const std::vector<BlockView> blocks = blocks_on(page);
    std::mt19937_64 random(10);
    std::size_t next = 0;
    for (const BlockView& block : blocks) {
        if (!is_delta(block.encoding)) continue;
        const BlockView base = view(all.bases[next], 16, 24, Dtype::f32);
        const auto start = static_cast<std::size_t>(block.data - at(page));
        for (std::uint32_t length = 0; length < block.length; ++length) {
            BlockView cut = block;
            cut.length = length;
            CHECK(is_handled(cut, base));
        }
        for (std::size_t damage = 0; damage < 4 * block.length; ++damage) {
            Buffer changed(page.begin(),
                           page.begin() + static_cast<std::ptrdiff_t>(start + block.length));
            BlockView damaged = block;
            changed[start + damage / 4] ^= static_cast<std::uint8_t>(1 + random() % 255);
            if (damage % 2 == 0) changed[random() % changed.size()] = 0xFF;
            changed.shrink_to_fit();
            damaged.data = at(changed) + start;
            damaged.before = static_cast<std::uint32_t>(random() % (start + 1));
            CHECK(is_handled(damaged, base));
        }
        ++next;
    }
}

TEST(batches_of_deltas_with_factors_are_alike_for_any_number_of_threads) {
    std::mt19937_64 random(11);
    const std::size_t rows = 64 * 12;
    const Buffer base = as_dtype(normal(rows * 64, 0.02, random), Dtype::f32);
    const Factors all = random_factors(rows, 64, 2, 300, -28, random);
    const Buffer block =
        changed(moved_by(all, base, rows, 64, Dtype::f32), Dtype::f32, Change::some_small, random);
    const BlockGrid grid{rows, 64, 64, 32};
    std::vector<std::int64_t> indices(grid.count()), row_of, col_of;
    std::vector<std::int32_t> of_rows(2 * rows), of_cols(2 * 64);
    for (std::size_t part = 0; part < 12; ++part) {
        for (std::size_t i = 0; i < 128; ++i) {
            of_rows[part * 128 + i] = all.of_rows[i / 64 * rows + part * 64 + i % 64];
        }
    }
    for (std::size_t part = 0; part < 2; ++part) {
        for (std::size_t i = 0; i < 64; ++i) {
            of_cols[part * 64 + i] = all.of_cols[i / 32 * 64 + part * 32 + i % 32];
        }
    }
    for (std::size_t i = 0; i < indices.size(); ++i) {
        indices[i] = static_cast<std::int64_t>(i);
        row_of.push_back(indices[i] / 2);
        col_of.push_back(indices[i] % 2);
    }
    const LowRankFactors factors{2, -28, of_rows, of_cols, row_of, col_of};
    const std::vector<std::int64_t> limits(indices.size(), 4000);
    const BaseBlocks bases{matrix(base, rows, 64, Dtype::f32), grid, indices};
    std::vector<Buffer> arenas;
    for (const unsigned threads : {1U, 3U}) {
        Buffer arena(4000 * indices.size());
        std::vector<std::int64_t> offsets(indices.size());
        std::vector<EncodedBlock> encoded(indices.size());
        arena.resize(encode_deltas(matrix(block, rows, 64, Dtype::f32), grid, indices, bases,
                                   limits, std::nullopt, {at(arena), arena.size()}, offsets,
                                   encoded, threads, &factors));
        for (std::size_t i = 0; i < indices.size(); ++i) {
            const auto from = arena.begin() + offsets[i];
            const Encoded delta{Buffer(from, from + encoded[i].length), encoded[i].encoding};
            const Buffer of_base = copied(block_of(bases.matrix, grid, i));
            const Buffer want = copied(block_of(matrix(block, rows, 64, Dtype::f32), grid, i));
            CHECK(delta.bytes[0] == 3);
            CHECK(decode(delta, view(of_base, 64, 32, Dtype::f32), Dtype::f32) == want);
        }
        arenas.push_back(arena);
    }
    CHECK(arenas[0] == arenas[1]);
    for (const auto& [which, row, col] :
         {std::tuple<std::size_t, std::int64_t, std::int64_t>{0, 12, 0}, {3, -1, 0}, {5, 0, 2}}) {
        auto [rows_of, cols_of] = std::pair(row_of, col_of);
        rows_of[which] = row;
        cols_of[which] = col;
        const LowRankFactors wrong{2, -28, of_rows, of_cols, rows_of, cols_of};
        Buffer arena(4000 * indices.size());
        std::vector<std::int64_t> offsets(indices.size());
        std::vector<EncodedBlock> encoded(indices.size());
        CHECK_THROWS(ErrorCode::invalid_argument,
                     static_cast<void>(encode_deltas(
                         matrix(block, rows, 64, Dtype::f32), grid, indices, bases, limits,
                         std::nullopt, {at(arena), arena.size()}, offsets, encoded, 1, &wrong)));
    }
}

}  // namespace

PYDEDUP_TEST_MAIN
