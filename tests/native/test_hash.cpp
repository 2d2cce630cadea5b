// SPDX-License-Identifier: Apache-2.0
// The block hash: every kernel against the scalar one, strides and panels against copies, and no
// byte read outside of the blocks (buffers end where the last row ends: ASan sees one too far).
#include <algorithm>
#include <cstdlib>
#include <random>
#include <span>
#include <vector>

#include "check.hpp"
#include "kernels.hpp"
#include "pydedup/hash.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

struct Shape {
    std::size_t rows, row_bytes, stride;
};

Digest digest_of(const KernelTable& table, const std::uint8_t* data, const Shape& shape,
                 std::uint64_t seed) {
    std::uint64_t out[2];
    table.hash.hash_rows(data, shape.rows, shape.row_bytes, shape.stride, seed, out);
    return {out[0], out[1]};
}

}  // namespace

TEST(every_kernel_hashes_like_the_reference) {
    std::mt19937_64 random(1);
    for (int round = 0; round < 4000; ++round) {
        Shape shape{random() % 20, random() % 700, 0};
        if (round % 3 == 0) shape.row_bytes -= shape.row_bytes % 128;
        shape.stride = shape.row_bytes + (round % 2 == 0 ? 0 : random() % 90);
        const std::uint64_t seed = round % 4 == 0 ? random() : 0;
        const std::size_t bytes =
            shape.rows == 0 ? 0 : (shape.rows - 1) * shape.stride + shape.row_bytes;
        const std::vector<std::uint8_t> data = random_bytes(bytes, random);
        const Digest want = digest_of(kScalarKernels, data.data(), shape, seed);
        for (const KernelTable* table : runnable_kernels()) {
            CHECK(digest_of(*table, data.data(), shape, seed) == want);
        }
    }
}

// A piece by itself is not asked of memory beforehand, up to 1 MiB.
TEST(a_single_piece_hashes_as_one_row_does) {
    std::mt19937_64 random(4);
    constexpr std::size_t kMiB = std::size_t{1} << 20;
    std::vector<std::size_t> sizes = {0, kMiB - 128, kMiB, kMiB + 128, kMiB + 1};
    for (int round = 0; round < 300; ++round) {
        const std::size_t size = random() % 5000;
        sizes.push_back(round % 2 == 0 ? size : size / 128 * 128);
    }
    for (const std::size_t size : sizes) {
        const std::vector<std::uint8_t> data = random_bytes(size, random);
        const Digest want = digest_of(kScalarKernels, data.data(), {1, size, size}, 5);
        CHECK((hash_bytes(std::as_bytes(std::span(data)), 5) == want));
        for (const KernelTable* table : runnable_kernels()) {
            CHECK((digest_of(*table, data.data(), {1, size, 0}, 5) == want));
        }
    }
}

TEST(a_panel_is_its_blocks) {
    std::mt19937_64 random(2);
    for (int round = 0; round < 1500; ++round) {
        const std::size_t blocks = 1 + random() % kPanelBlocks;
        const std::size_t rows = 1 + random() % 69;
        const std::size_t row_bytes = 1 + random() % 300;
        const std::size_t stride = blocks * row_bytes + random() % 50;
        const std::size_t bytes = (rows - 1) * stride + blocks * row_bytes;
        const std::vector<std::uint8_t> data = random_bytes(bytes, random);
        const std::uint64_t seed = random() % 2 == 0 ? 0 : random();
        for (const KernelTable* table : runnable_kernels()) {
            std::vector<std::uint64_t> out(2 * blocks);
            table->hash.hash_panel(data.data(), blocks, rows, row_bytes, stride, seed, out.data());
            for (std::size_t b = 0; b < blocks; ++b) {
                const Digest want = digest_of(kScalarKernels, data.data() + b * row_bytes,
                                              {rows, row_bytes, stride}, seed);
                CHECK((Digest{out[2 * b], out[2 * b + 1]} == want));
            }
        }
    }
}

TEST(blocks_of_a_matrix_hash_like_their_copies_for_any_number_of_threads) {
    std::mt19937_64 random(3);
    for (int round = 0; round < 60; ++round) {
        const std::size_t rows = 1 + random() % 300;
        const std::size_t cols = 1 + random() % 2500;
        const std::vector<std::uint8_t> data = random_bytes(rows * cols * 2, random);
        const BlockGrid grid{rows, cols, 1 + random() % 80, 1 + random() % 80};
        const MatrixRef matrix{reinterpret_cast<const std::byte*>(data.data()), rows, cols,
                               cols * 2, Dtype::bf16};
        std::vector<Digest> digests(grid.count());
        hash_blocks(matrix, grid, 5, digests, static_cast<unsigned>(1 + round % 4));
        for (std::size_t i = 0; i < grid.count(); i += 1 + random() % 9) {
            const BlockRect rect = block_rect(grid, i);
            std::vector<std::byte> copy;
            for (std::size_t r = 0; r < rect.rows; ++r) {
                const std::byte* row = matrix.data + (rect.row0 + r) * cols * 2 + rect.col0 * 2;
                copy.insert(copy.end(), row, row + rect.cols * 2);
            }
            CHECK(hash_rows(copy.data(), rect.rows, rect.cols * 2, rect.cols * 2, 5) == digests[i]);
        }
    }
}

TEST(a_matrix_without_elements_has_no_digests) {
    const std::byte nothing{};
    for (const BlockGrid& grid :
         {BlockGrid{3, 0, 4, 4}, BlockGrid{0, 3, 4, 4}, BlockGrid{0, 0, 1, 1}}) {
        hash_blocks({&nothing, grid.rows, grid.cols, 0, Dtype::u8}, grid, 0, {});
        CHECK(grid.count() == 0);
    }
}

TEST(the_number_of_digests_must_fit) {
    const std::vector<std::byte> data(64);
    const MatrixRef matrix{data.data(), 8, 8, 8, Dtype::u8};
    std::vector<Digest> digests(3);
    CHECK_THROWS(ErrorCode::invalid_argument, hash_blocks(matrix, {8, 8, 4, 4}, 0, digests));
}

TEST(an_unknown_kernel_is_refused) {
    CHECK_THROWS(ErrorCode::kernel_unavailable, static_cast<void>(kernels_named("avx1024")));
}

PYDEDUP_TEST_MAIN
