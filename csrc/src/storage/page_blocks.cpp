// SPDX-License-Identifier: Apache-2.0
// Blocks of a matrix against blocks on pages, many at a time.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "base/block_index.hpp"
#include "base/parallel.hpp"
#include "pydedup/decoded.hpp"
#include "pydedup/error.hpp"
#include "pydedup/page_format.hpp"
#include "storage/block_rows.hpp"

namespace pydedup {
namespace {

constexpr std::size_t kParallelBytes = 2 * 1024 * 1024;
constexpr std::size_t kParallelGrain = 16;

void check_arguments(std::span<const Page* const> pages, std::span<const StoredBlock> stored,
                     const StoredBases& bases, std::span<const std::int64_t> indices,
                     const BlockGrid& grid) {
    if (!bases.bases.empty() && bases.bases.size() != indices.size()) {
        throw Error(ErrorCode::invalid_argument, std::to_string(indices.size()) +
                                                     " block indices came with " +
                                                     std::to_string(bases.bases.size()) + " bases");
    }
    if (stored.size() != indices.size()) {
        throw Error(ErrorCode::invalid_argument,
                    std::to_string(indices.size()) + " block indices came with " +
                        std::to_string(stored.size()) + " places on pages");
    }
    const std::size_t n_blocks = grid.count();
    for (std::size_t i = 0; i < indices.size(); ++i) {
        detail::check_block_index(indices[i], n_blocks);
        if (stored[i].page >= pages.size()) {
            throw Error(ErrorCode::invalid_argument,
                        "page index " + std::to_string(stored[i].page) +
                            " is outside of a list of " + std::to_string(pages.size()) + " pages");
        }
    }
}

unsigned worker_count(std::span<const std::int64_t> indices, const BlockGrid& grid, Dtype dtype,
                      unsigned threads) {
    const std::size_t block_bytes = std::min(grid.block_rows, grid.rows) *
                                    std::min(grid.block_cols, grid.cols) * item_bytes(dtype);
    return thread_count(threads, indices.size() * block_bytes, kParallelBytes);
}

// `rows` are those of a block of the other's shape and dtype, without gaps.
bool rows_equal(const MatrixRef& block, const std::byte* rows) noexcept {
    const std::size_t row_bytes = block.cols * item_bytes(block.dtype);
    for (std::size_t r = 0; r < block.rows; ++r) {
        if (std::memcmp(block.data + r * block.stride_bytes, rows + r * row_bytes, row_bytes) !=
            0) {
            return false;
        }
    }
    return true;
}

// Views that a thread makes at a time; for fewer a second one is not woken.
constexpr std::size_t kViewsPerPiece = 1024;

}  // namespace

BlockView with_base(BlockView block, const StoredBases& bases, std::size_t i, BlockView& base) {
    if (bases.bases.empty() || bases.bases[i].page == kNoPage || !is_delta(block.encoding)) {
        return block;
    }
    const StoredBlock at = bases.bases[i];
    if (at.page >= bases.pages.size() || bases.pages[at.page] == nullptr) {
        throw Error(ErrorCode::invalid_argument,
                    "the base of block " + std::to_string(i) + " is on page " +
                        std::to_string(at.page) + ", which is not among the " +
                        std::to_string(bases.pages.size()) + " that were given");
    }
    base = bases.pages[at.page]->block(at.slot);
    block.base_block = &base;
    return block;
}

void view_blocks(std::span<const Page* const> pages, std::span<const std::uint32_t> page_index,
                 std::span<const std::uint32_t> slots, std::span<BlockView> views, unsigned threads,
                 std::span<DecodedBlocks* const> decoded) {
    // Each view waits for memory: the directories of pages lie apart.
    const auto view_some = [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
            // Read once: where there is no GIL, another thread may write into an array of Python.
            const std::size_t page = page_index[i];
            const std::size_t slot = slots[i];
            if (page >= pages.size()) {
                throw Error(ErrorCode::invalid_argument,
                            "page_index " + std::to_string(page) + " is outside of " +
                                std::to_string(pages.size()) + " pages");
            }
            views[i] = pages[page]->block(slot);
            if (decoded.empty() || decoded[page] == nullptr) continue;
            decoded[page]->show(slot, views[i]);
        }
    };
    parallel_for(views.size(), kViewsPerPiece, thread_count(threads), view_some);
}

void read_blocks(std::span<const Page* const> pages, std::span<const StoredBlock> stored,
                 const StoredBases& bases, std::span<const std::int64_t> indices,
                 const BlockGrid& grid, Dtype dtype, std::byte* out, std::size_t out_stride_bytes,
                 unsigned threads) {
    check_arguments(pages, stored, bases, indices, grid);
    const std::size_t item = item_bytes(dtype);
    const unsigned workers = worker_count(indices, grid, dtype, threads);
    parallel_for(indices.size(), kParallelGrain, workers, [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
            const BlockRect rect = block_rect(grid, static_cast<std::size_t>(indices[i]));
            BlockView base{};
            const BlockView block =
                with_base(pages[stored[i].page]->block(stored[i].slot), bases, i, base);
            if (block.dtype != dtype || block.rows != rect.rows || block.cols != rect.cols) {
                throw Error(ErrorCode::corrupt_page,
                            "slot " + std::to_string(stored[i].slot) + " holds a block of " +
                                std::to_string(block.rows) + " x " + std::to_string(block.cols) +
                                " elements of dtype code " +
                                std::to_string(static_cast<unsigned>(block.dtype)) +
                                " where block " + std::to_string(indices[i]) + " has " +
                                std::to_string(rect.rows) + " x " + std::to_string(rect.cols) +
                                " of code " + std::to_string(static_cast<unsigned>(dtype)));
            }
            decode_block(block, out + rect.row0 * out_stride_bytes + rect.col0 * item,
                         out_stride_bytes);
        }
    });
}

void blocks_equal(std::span<const Page* const> pages, std::span<const StoredBlock> stored,
                  const StoredBases& bases, std::span<const std::int64_t> indices,
                  const MatrixRef& matrix, const BlockGrid& grid, std::span<bool> equal,
                  unsigned threads) {
    check_arguments(pages, stored, bases, indices, grid);
    if (equal.size() != indices.size()) {
        throw Error(ErrorCode::invalid_argument, "blocks_equal was given a result of a wrong size");
    }
    const unsigned workers = worker_count(indices, grid, matrix.dtype, threads);
    parallel_for(indices.size(), kParallelGrain, workers, [&](std::size_t begin, std::size_t end) {
        detail::Scratch<std::byte> scratch;
        for (std::size_t i = begin; i < end; ++i) {
            const MatrixRef own = block_of(matrix, grid, static_cast<std::size_t>(indices[i]));
            BlockView base{};
            const BlockView block =
                with_base(pages[stored[i].page]->block(stored[i].slot), bases, i, base);
            equal[i] = block.dtype == own.dtype && block.rows == own.rows && block.cols == own.cols;
            equal[i] = equal[i] && rows_equal(own, detail::rows_of(block, scratch));
        }
    });
}

}  // namespace pydedup
