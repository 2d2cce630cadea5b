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

}  // namespace

Digest hash_rows(const std::byte* data, std::size_t rows, std::size_t row_bytes,
                 std::size_t stride_bytes, std::uint64_t seed) {
    std::uint64_t out[2];
    kernels().hash.hash_rows(reinterpret_cast<const std::uint8_t*>(data), rows, row_bytes,
                             stride_bytes, seed, out);
    return {out[0], out[1]};
}

Digest hash_bytes(Bytes bytes, std::uint64_t seed) {
    return hash_rows(bytes.data(), 1, bytes.size(), bytes.size(), seed);
}

void hash_blocks(const MatrixRef& matrix, const BlockGrid& grid, std::uint64_t seed,
                 std::span<Digest> out, unsigned threads) {
    if (out.size() != grid.count()) {
        throw Error(ErrorCode::invalid_argument,
                    "hash_blocks: " + std::to_string(out.size()) + " digests for " +
                        std::to_string(grid.count()) + " blocks");
    }
    const std::size_t item = item_bytes(matrix.dtype);
    const std::size_t total_bytes = matrix.rows * matrix.cols * item;
    const std::size_t useful = total_bytes / kBytesPerThread + 1;
    const auto workers =
        static_cast<unsigned>(std::min<std::size_t>(useful, thread_count(threads)));
    const std::size_t grain = std::max<std::size_t>(1, grid.count() / (std::size_t{workers} * 8));
    parallel_for(grid.count(), grain, workers, [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
            const BlockRect rect = block_rect(grid, i);
            out[i] = hash_rows(matrix.data + rect.row0 * matrix.stride_bytes + rect.col0 * item,
                               rect.rows, rect.cols * item, matrix.stride_bytes, seed);
        }
    });
}

}  // namespace pydedup
