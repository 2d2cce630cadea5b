// SPDX-License-Identifier: Apache-2.0
// Checks, splits over threads, and calls the chosen kernel. Stateless and thread-safe.
#include "pydedup/hash.hpp"

#include "base/parallel.hpp"
#include "dispatch/dispatch.hpp"
#include "pydedup/error.hpp"

namespace pydedup {
namespace {

// Below this a second thread costs more than it saves (2-core EPYC: 20 us against 16 GB/s).
constexpr std::size_t kBytesPerThread = std::size_t{1} << 20;

// All blocks of one row of the grid: groups of inner blocks together, an edge block by itself.
void hash_block_row(const MatrixRef& matrix, const BlockGrid& grid, std::size_t grid_row,
                    std::uint64_t seed, std::span<Digest> out) {
    static_assert(sizeof(Digest) == 2 * sizeof(std::uint64_t));
    const HashKernels& kernel = kernels().hash;
    const std::size_t item = item_bytes(matrix.dtype);
    const std::size_t inner = grid.cols / grid.block_cols;  // blocks of full width
    const std::size_t row_bytes = grid.block_cols * item;
    const BlockRect first = block_rect(grid, grid_row * grid.grid_cols());
    const auto* data =
        reinterpret_cast<const std::uint8_t*>(matrix.data) + first.row0 * matrix.stride_bytes;
    auto* digests = reinterpret_cast<std::uint64_t*>(out.data() + grid_row * grid.grid_cols());
    for (std::size_t b = 0; b < inner; b += kPanelBlocks) {
        const std::size_t blocks = std::min(kPanelBlocks, inner - b);
        if (blocks == 1) {
            kernel.hash_rows(data + b * row_bytes, first.rows, row_bytes, matrix.stride_bytes, seed,
                             digests + 2 * b);
        } else {
            kernel.hash_panel(data + b * row_bytes, blocks, first.rows, row_bytes,
                              matrix.stride_bytes, seed, digests + 2 * b);
        }
    }
    if (inner != grid.grid_cols()) {
        kernel.hash_rows(data + inner * row_bytes, first.rows, grid.cols * item - inner * row_bytes,
                         matrix.stride_bytes, seed, digests + 2 * inner);
    }
}

}  // namespace

Digest hash_rows(const std::byte* data, std::size_t rows, std::size_t row_bytes,
                 std::size_t stride_bytes, std::uint64_t seed) {
    std::uint64_t out[2];
    kernels().hash.hash_rows(reinterpret_cast<const std::uint8_t*>(data), rows, row_bytes,
                             stride_bytes, seed, out);
    return {out[0], out[1]};
}

Digest hash_bytes(Bytes bytes, std::uint64_t seed) {
    return hash_rows(bytes.data(), 1, bytes.size(), 0, seed);
}

void hash_blocks(const MatrixRef& matrix, const BlockGrid& grid, std::uint64_t seed,
                 std::span<Digest> out, unsigned threads) {
    if (out.size() != grid.count()) {
        throw Error(ErrorCode::invalid_argument, "hash_blocks: " + std::to_string(out.size()) +
                                                     " digests for " +
                                                     std::to_string(grid.count()) + " blocks");
    }
    if (grid.count() == 0) return;
    const std::size_t item = item_bytes(matrix.dtype);
    const std::size_t total_bytes = matrix.rows * matrix.cols * item;
    const std::size_t useful = total_bytes / kBytesPerThread + 1;
    const auto workers =
        static_cast<unsigned>(std::min<std::size_t>(useful, thread_count(threads)));
    const std::size_t grain =
        std::max<std::size_t>(1, grid.grid_rows() / (std::size_t{workers} * 8));
    parallel_for(grid.grid_rows(), grain, workers, [&](std::size_t begin, std::size_t end) {
        for (std::size_t row = begin; row < end; ++row)
            hash_block_row(matrix, grid, row, seed, out);
    });
}

}  // namespace pydedup
