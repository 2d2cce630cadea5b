// SPDX-License-Identifier: Apache-2.0
// Pages: layout, refusal of everything that is not exactly a page, and blocks of a matrix on them.
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "base/endian.hpp"
#include "check.hpp"
#include "pydedup/hash.hpp"
#include "pydedup/page_format.hpp"

using namespace pydedup;

namespace {

using Buffer = std::vector<std::byte>;

Buffer pattern(std::size_t n, unsigned seed) {
    std::mt19937 random(seed);
    Buffer bytes(n);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
    return bytes;
}

BlockView raw_block(const Buffer& bytes, Dtype dtype, std::uint32_t rows, std::uint32_t cols) {
    return {bytes.data(),
            static_cast<std::uint32_t>(bytes.size()),
            Encoding::raw,
            dtype,
            rows,
            cols,
            0};
}

struct Sample {
    Buffer a = pattern(3 * 5 * 4, 1);
    Buffer b = pattern(64, 2);
    Buffer zeros = Buffer(32 * 32 * 2);
    Buffer c = Buffer(zeros.size());
    std::vector<BlockView> blocks;
    Buffer page;

    Sample() {
        const EncodedBlock encoded =
            encode_block({zeros.data(), 32, 32, 64, Dtype::bf16}, true, {c.data(), c.size()});
        blocks = {raw_block(a, Dtype::f32, 3, 5), raw_block(b, Dtype::i8, 1, 64),
                  BlockView{c.data(), encoded.length, encoded.encoding, Dtype::bf16, 32, 32, 0}};
        page.resize(page_bytes(blocks));
        build_page(blocks, page);
    }
};

// Makes the checksum right again, so that the check behind it is reached.
void sign(Buffer& page) {
    const Digest digest = hash_bytes(Bytes(page).subspan(24), load_le<std::uint64_t>(page.data()));
    store_le(page.data() + 8, digest.lo);
    store_le(page.data() + 16, digest.hi);
}

template <class T>
Buffer with(const Buffer& page, std::size_t at, T value) {
    Buffer changed = page;
    store_le(changed.data() + at, value);
    sign(changed);
    return changed;
}

TEST(a_page_lies_as_the_format_says) {
    const Sample sample;
    const Buffer& page = sample.page;
    CHECK(std::memcmp(page.data(), "PDPG\1\0\100\0", 8) == 0);
    CHECK(load_le<std::uint32_t>(page.data() + 24) == 3);
    CHECK(load_le<std::uint32_t>(page.data() + 28) == kSlotBytes);
    CHECK(load_le<std::uint64_t>(page.data() + 32) == page.size());
    const PageView view = PageView::parse(page);
    CHECK(view.n_slots() == 3);
    // 64 + 3 * 32 = 160 -> 192; + 60 -> 256; + 64 = 320; + 24 and no padding.
    CHECK(view.offset(0) == 192 && view.offset(1) == 256 && view.offset(2) == 320);
    CHECK(page.size() == 320 + 24);
    for (std::size_t slot = 0; slot < 3; ++slot) {
        const BlockView got = view.block(slot);
        const BlockView& want = sample.blocks[slot];
        CHECK(got.length == want.length && got.encoding == want.encoding);
        CHECK(got.dtype == want.dtype && got.rows == want.rows && got.cols == want.cols);
        CHECK(got.base == 0);
        CHECK(std::memcmp(got.data, want.data, want.length) == 0);
    }
    CHECK_THROWS(ErrorCode::corrupt_page, static_cast<void>(view.block(3)));
    Buffer again(page.size(), std::byte{0xFF});
    build_page(sample.blocks, again);
    CHECK(again == page);
}

TEST(an_empty_page_is_a_header) {
    Buffer page(page_bytes({}));
    CHECK(page.size() == kPageHeaderBytes);
    build_page({}, page);
    CHECK(PageView::parse(page).n_slots() == 0);
}

TEST(every_changed_bit_is_noticed) {
    const Sample sample;
    for (std::size_t byte = 0; byte < sample.page.size(); ++byte) {
        for (unsigned bit = 0; bit < 8; ++bit) {
            Buffer damaged = sample.page;
            damaged[byte] ^= static_cast<std::byte>(1U << bit);
            const bool newer = byte == 4 || byte == 5;
            // Version 0 is no newer one.
            const bool older = byte == 4 && bit == 0;
            CHECK_THROWS(newer && !older ? ErrorCode::unsupported_format : ErrorCode::corrupt_page,
                         static_cast<void>(PageView::parse(damaged)));
        }
    }
}

TEST(every_truncation_is_noticed) {
    const Sample sample;
    for (std::size_t n = 0; n < sample.page.size(); ++n) {
        const Buffer cut(sample.page.begin(), sample.page.begin() + static_cast<std::ptrdiff_t>(n));
        CHECK_THROWS(ErrorCode::corrupt_page, static_cast<void>(PageView::parse(cut)));
        CHECK_THROWS(ErrorCode::corrupt_page, static_cast<void>(PageView::parse(cut, false)));
    }
    Buffer longer = sample.page;
    longer.push_back(std::byte{0});
    CHECK_THROWS(ErrorCode::corrupt_page, static_cast<void>(PageView::parse(longer)));
}

TEST(a_right_checksum_does_not_make_a_page) {
    const Sample sample;
    const Buffer& page = sample.page;
    const std::size_t slot = kPageHeaderBytes;
    CHECK(PageView::parse(with<std::uint32_t>(page, 24, 3)).n_slots() == 3);
    const auto refused = [&](const Buffer& changed) {
        CHECK_THROWS(ErrorCode::corrupt_page, static_cast<void>(PageView::parse(changed)));
    };
    refused(with<std::uint16_t>(page, 6, 128));  // header bytes
    refused(with<std::uint32_t>(page, 24, 2));   // slots
    refused(with<std::uint32_t>(page, 24, 4));
    refused(with<std::uint32_t>(page, 24, 0xFFFFFFFF));
    refused(with<std::uint32_t>(page, 28, 64));  // slot bytes
    refused(with<std::uint64_t>(page, 32, page.size() + 1));
    refused(with<std::uint8_t>(page, 63, 1));        // reserved
    refused(with<std::uint8_t>(page, slot, 2));      // encoding
    refused(with<std::uint8_t>(page, slot, 1));      // planes as long as raw
    refused(with<std::uint8_t>(page, slot + 1, 0));  // dtype
    refused(with<std::uint8_t>(page, slot + 1, 16));
    refused(with<std::uint8_t>(page, slot + 1, 1));   // f64: raw length does not fit
    refused(with<std::uint16_t>(page, slot + 2, 1));  // reserved
    refused(with<std::uint32_t>(page, slot + 4, 4));  // rows
    refused(with<std::uint32_t>(page, slot + 4, 0));
    refused(with<std::uint32_t>(page, slot + 8, 0));   // cols
    refused(with<std::uint32_t>(page, slot + 12, 0));  // length
    refused(with<std::uint32_t>(page, slot + 12, 0xFFFFFFFF));
    refused(with<std::uint64_t>(page, slot + 16, 128));  // offset: into the slot table
    refused(with<std::uint64_t>(page, slot + 16, 256));  // onto the next block
    refused(with<std::uint64_t>(page, slot + 16, 0xFFFFFFFFFFFFFFC0));
    refused(with<std::uint64_t>(page, slot + 24, 7));  // base of a block that is no delta
    Buffer huge = with<std::uint32_t>(page, slot + 4, 0x80000000);
    refused(with<std::uint32_t>(huge, slot + 8, 0x80000000));  // product of 2^62
    CHECK_THROWS(ErrorCode::unsupported_format,
                 static_cast<void>(PageView::parse(with<std::uint16_t>(page, 4, 3))));
    refused(with<std::uint16_t>(page, 4, 2));  // the version of pages with deltas
    refused(with<std::uint16_t>(page, 4, 0));
    Buffer longer = page;  // what follows the last block is no part of a page
    longer.push_back(std::byte{0});
    refused(with<std::uint64_t>(longer, 32, longer.size()));
    const Buffer planes = with<std::uint8_t>(page, slot, 1);
    refused(with<std::uint32_t>(planes, slot + 4, 0x80000000));  // decoded, 4 GiB or more
}

TEST(a_right_checksum_does_not_make_a_page_with_deltas) {
    const Buffer bytes = pattern(16, 5);
    for (const Encoding encoding : {Encoding::delta, Encoding::quantised}) {
        const BlockView block{bytes.data(), 16, encoding, Dtype::f32, 8, 8, 5};
        Buffer page(page_bytes({&block, 1}));
        build_page({&block, 1}, page);
        const std::size_t slot = kPageHeaderBytes;
        CHECK(PageView::parse(with<std::uint64_t>(page, slot + 24, 6)).block(0).base == 6);
        CHECK(PageView::parse(with<std::uint32_t>(page, slot + 4, 1)).block(0).rows == 1);
        const auto refused = [&](const Buffer& changed) {
            CHECK_THROWS(ErrorCode::corrupt_page, static_cast<void>(PageView::parse(changed)));
        };
        refused(with<std::uint64_t>(page, slot + 24, 0));  // no base
        const Buffer row = with<std::uint32_t>(page, slot + 4, 1);
        refused(with<std::uint32_t>(row, slot + 8, 4));            // as long as raw
        refused(with<std::uint32_t>(page, slot + 4, 0x80000000));  // decoded, 4 GiB or more
        refused(with<std::uint16_t>(page, 4, 1));                  // version 1 has no deltas
    }
}

TEST(random_bytes_are_no_page) {
    const Sample sample;
    std::mt19937_64 random(5);
    for (int round = 0; round < 20000; ++round) {
        Buffer damaged = sample.page;
        for (std::uint64_t n = 1 + random() % 4; n-- > 0;) {
            damaged[random() % (kPageHeaderBytes + 3 * kSlotBytes)] =
                static_cast<std::byte>(random());
        }
        damaged.resize(random() % 4 == 0 ? random() % (damaged.size() + 1) : damaged.size());
        damaged.shrink_to_fit();
        if (damaged.size() >= kPageHeaderBytes) sign(damaged);
        try {
            const PageView view = PageView::parse(damaged);
            // Whatever passes is safe to decode.
            for (std::size_t slot = 0; slot < view.n_slots(); ++slot) {
                const BlockView block = view.block(slot);
                if (block.raw_bytes() > (1U << 20)) continue;  // only to spare the test's memory
                Buffer out(block.raw_bytes());
                try {
                    decode_block(block, out.data(), block.row_bytes());
                } catch (const Error& error) {
                    CHECK(error.code() == ErrorCode::corrupt_page);
                }
            }
        } catch (const Error& error) {
            CHECK(error.code() == ErrorCode::corrupt_page ||
                  error.code() == ErrorCode::unsupported_format);
        }
    }
}

TEST(blocks_that_no_page_can_hold_are_refused) {
    const Buffer bytes = pattern(64, 3);
    const auto refused = [&](BlockView block) {
        const std::vector<BlockView> blocks = {block};
        Buffer page(page_bytes(blocks));
        CHECK_THROWS(ErrorCode::invalid_argument, build_page(blocks, page));
    };
    refused(raw_block(bytes, Dtype::f32, 4, 5));
    refused(raw_block(bytes, static_cast<Dtype>(99), 4, 4));
    BlockView block = raw_block(bytes, Dtype::f32, 4, 4);
    block.base = 1;
    refused(block);
    block = raw_block(bytes, Dtype::f32, 4, 4);
    block.encoding = static_cast<Encoding>(9);
    refused(block);
    for (const Encoding encoding : {Encoding::planes, Encoding::delta, Encoding::quantised}) {
        block = {bytes.data(), 0, encoding, Dtype::f32, 4, 4, is_delta(encoding) ? 1U : 0U};
        refused(block);
        block.length = 8;
        Buffer page(page_bytes({&block, 1}));
        build_page({&block, 1}, page);  // of eight bytes it can be
    }
    const std::vector<BlockView> blocks = {raw_block(bytes, Dtype::f32, 4, 4)};
    Buffer short_page(page_bytes(blocks) - 1);
    CHECK_THROWS(ErrorCode::invalid_argument, build_page(blocks, short_page));
}

// A page that owns its memory, and says when it is gone.
Page owned_page(const Buffer& bytes, bool& released) {
    auto* copy = new Buffer(bytes);
    const std::shared_ptr<const std::byte> owner(copy->data(), [copy, &released](const std::byte*) {
        delete copy;
        released = true;
    });
    return {owner, bytes.size()};
}

TEST(a_page_keeps_its_memory_as_long_as_a_copy_lives) {
    const Sample sample;
    bool released = false;
    {
        auto first = std::make_unique<Page>(owned_page(sample.page, released));
        const Page second = *first;
        first.reset();
        CHECK(!released);
        CHECK(second.block(1).length == 64);
    }
    CHECK(released);
    released = false;
    Buffer damaged = sample.page;
    damaged.back() ^= std::byte{1};
    CHECK_THROWS(ErrorCode::corrupt_page, static_cast<void>(owned_page(damaged, released)));
    CHECK(released);
}

TEST(blocks_of_a_matrix_go_to_pages_and_back) {
    const std::size_t rows = 70;
    const std::size_t cols = 90;
    Buffer source = pattern(rows * cols * 2, 6);
    std::memset(source.data(), 0, source.size() / 2);  // so that some blocks compress
    const MatrixRef matrix{source.data(), rows, cols, cols * 2, Dtype::i16};
    const BlockGrid grid{rows, cols, 32, 32};
    std::vector<std::int64_t> indices;
    std::vector<StoredBlock> stored;
    for (std::size_t i = 0; i < grid.count(); ++i) indices.push_back(static_cast<std::int64_t>(i));
    Buffer arena(source.size());
    std::vector<std::int64_t> offsets(indices.size());
    std::vector<EncodedBlock> encoded(indices.size());
    static_cast<void>(encode_blocks(matrix, grid, indices, true, arena, offsets, encoded));
    std::vector<std::vector<BlockView>> on_page(2);
    bool compressed = false;
    for (std::size_t i = 0; i < indices.size(); ++i) {
        const BlockRect rect = block_rect(grid, i);
        auto& blocks = on_page[i % 2];
        stored.push_back(
            {static_cast<std::uint32_t>(i % 2), static_cast<std::uint32_t>(blocks.size())});
        blocks.push_back({arena.data() + offsets[i], encoded[i].length, encoded[i].encoding,
                          Dtype::i16, static_cast<std::uint32_t>(rect.rows),
                          static_cast<std::uint32_t>(rect.cols), 0});
        compressed |= encoded[i].encoding == Encoding::planes;
    }
    CHECK(compressed);
    bool released = false;  // outlives the pages, which write to it
    std::vector<Page> pages;
    for (const auto& blocks : on_page) {
        Buffer bytes(page_bytes(blocks));
        build_page(blocks, bytes);
        pages.push_back(owned_page(bytes, released));
    }
    const std::vector<const Page*> list = {&pages[0], &pages[1]};
    const auto n = indices.size();
    for (const unsigned threads : {1U, 3U}) {
        Buffer out(source.size(), std::byte{0x5A});
        read_blocks(list, stored, {}, indices, grid, Dtype::i16, out.data(), cols * 2, threads);
        CHECK(out == source);
        const std::unique_ptr<bool[]> equal(new bool[n]{});
        blocks_equal(list, stored, {}, indices, matrix, grid, {equal.get(), n}, threads);
        for (std::size_t i = 0; i < n; ++i) CHECK(equal[i]);
    }
    {  // Memory for what is decoded grows with the blocks: those at the edges come first.
        const std::vector<StoredBlock> back(stored.rbegin(), stored.rend());
        const std::vector<std::int64_t> numbers(indices.rbegin(), indices.rend());
        const std::unique_ptr<bool[]> same(new bool[n]{});
        blocks_equal(list, back, {}, numbers, matrix, grid, {same.get(), n}, 1);
        for (std::size_t i = 0; i < n; ++i) CHECK(same[i]);
    }
    // A change in one element is a change of its block alone.
    source[(40 * cols + 5) * 2] ^= std::byte{1};
    const std::unique_ptr<bool[]> equal(new bool[n]{});
    blocks_equal(list, stored, {}, indices, matrix, grid, {equal.get(), n});
    for (std::size_t i = 0; i < n; ++i) CHECK(equal[i] == (i != 3));
    MatrixRef other = matrix;
    other.dtype = Dtype::u16;
    blocks_equal(list, stored, {}, indices, other, grid, {equal.get(), n});
    for (std::size_t i = 0; i < n; ++i) CHECK(!equal[i]);
    // Another shape or dtype than the slot's, places that do not exist.
    Buffer out(source.size());
    const auto read = [&](StoredBlock place, std::int64_t index, Dtype dtype) {
        read_blocks(list, std::vector{place}, {}, std::vector{index}, grid, dtype, out.data(),
                    cols * 2);
    };
    read(stored[0], 0, Dtype::i16);
    CHECK_THROWS(ErrorCode::corrupt_page, read(stored[0], 0, Dtype::u16));
    CHECK_THROWS(ErrorCode::corrupt_page, read(stored[0], 2, Dtype::i16));
    CHECK_THROWS(ErrorCode::corrupt_page, read({0, 99}, 0, Dtype::i16));
    CHECK_THROWS(ErrorCode::invalid_argument, read({2, 0}, 0, Dtype::i16));
    CHECK_THROWS(ErrorCode::invalid_argument, read(stored[0], 9, Dtype::i16));
    CHECK_THROWS(ErrorCode::invalid_argument, read(stored[0], -1, Dtype::i16));
}

}  // namespace

PYDEDUP_TEST_MAIN
