// SPDX-License-Identifier: Apache-2.0
// Reading blocks some of which are deltas on blocks of other pages.
#include <algorithm>
#include <string>

#include "base/parallel.hpp"
#include "pydedup/error.hpp"
#include "pydedup/page_format.hpp"

namespace pydedup {
namespace {

constexpr std::size_t kParallelBytes = 1024 * 1024;
constexpr std::size_t kParallelGrain = 8;

const Page& page_at(std::span<const Page* const> pages, std::uint32_t index, const char* what) {
    if (index >= pages.size()) {
        throw Error(ErrorCode::invalid_argument, std::string(what) + " " + std::to_string(index) +
                                                     " is outside of a list of " +
                                                     std::to_string(pages.size()) + " pages");
    }
    return *pages[index];
}

}  // namespace

void read_blocks(std::span<const Page* const> pages, std::span<const StoredBlock> stored,
                 const StoredBases& bases, std::span<const std::int64_t> indices,
                 const BlockGrid& grid, Dtype dtype, std::byte* out, std::size_t out_stride_bytes,
                 unsigned threads) {
    if (stored.size() != indices.size() || bases.bases.size() != indices.size()) {
        throw Error(ErrorCode::invalid_argument,
                    std::to_string(indices.size()) + " block indices came with " +
                        std::to_string(stored.size()) + " places on pages and " +
                        std::to_string(bases.bases.size()) + " bases");
    }
    const std::size_t item = item_bytes(dtype);
    const std::size_t block_bytes =
        std::min(grid.block_rows, grid.rows) * std::min(grid.block_cols, grid.cols) * item;
    const unsigned workers =
        threads == 0 && indices.size() * block_bytes < kParallelBytes ? 1 : thread_count(threads);
    parallel_for(indices.size(), kParallelGrain, workers, [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
            const Page& page = page_at(pages, stored[i].page, "page index");
            const StoredBlock base = bases.bases[i];
            const BlockView block = page.block(stored[i].slot);
            if (!is_delta(block.encoding) || base.page == kNoPage) {
                read_blocks(pages, stored.subspan(i, 1), indices.subspan(i, 1), grid, dtype, out,
                            out_stride_bytes, 1);
                continue;
            }
            if (indices[i] < 0 || static_cast<std::size_t>(indices[i]) >= grid.count()) {
                throw Error(ErrorCode::invalid_argument,
                            "block " + std::to_string(indices[i]) + " is outside of a grid of " +
                                std::to_string(grid.count()) + " blocks");
            }
            const BlockRect rect = block_rect(grid, static_cast<std::size_t>(indices[i]));
            if (block.dtype != dtype || block.rows != rect.rows || block.cols != rect.cols) {
                throw Error(ErrorCode::corrupt_page,
                            "slot " + std::to_string(stored[i].slot) +
                                " holds a delta of another dtype or shape than block " +
                                std::to_string(indices[i]));
            }
            decode_delta(block, page_at(bases.pages, base.page, "base page index").block(base.slot),
                         out + rect.row0 * out_stride_bytes + rect.col0 * item, out_stride_bytes);
        }
    });
}

}  // namespace pydedup
