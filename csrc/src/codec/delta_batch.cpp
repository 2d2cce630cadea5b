// SPDX-License-Identifier: Apache-2.0
// Deltas of many blocks of a matrix, between threads.
#include <string>

#include "base/parallel.hpp"
#include "codec/arena.hpp"
#include "codec/delta_encoder.hpp"
#include "pydedup/codec.hpp"
#include "pydedup/error.hpp"

namespace pydedup {
namespace {

constexpr std::size_t kParallelBytes = 1024 * 1024;
constexpr std::size_t kParallelGrain = 8;

MatrixRef base_of(const BaseBlocks& bases, std::size_t i) noexcept {
    return block_of(bases.matrix, bases.grid, static_cast<std::size_t>(bases.indices[i]));
}

// Returns the raw bytes of the blocks.
std::size_t check(const MatrixRef& matrix, const BlockGrid& grid,
                  std::span<const std::int64_t> indices, const BaseBlocks& bases) {
    if (bases.indices.size() != indices.size()) {
        throw Error(ErrorCode::invalid_argument,
                    std::to_string(indices.size()) + " block indices came with " +
                        std::to_string(bases.indices.size()) + " bases");
    }
    static_cast<void>(raw_bytes_of(bases.matrix, bases.grid, bases.indices));
    return raw_bytes_of(matrix, grid, indices);
}

// Factors of a block within all of them.
detail::Factor factor_of(std::span<const std::int32_t> all, std::int64_t which,
                         std::size_t size) noexcept {
    return all.subspan(static_cast<std::size_t>(which) * size, size);
}

detail::LowRank low_rank_of(const LowRankFactors& factors, const MatrixRef& block,
                            std::size_t i) noexcept {
    return {factors.rank, factors.exponent,
            factor_of(factors.of_rows, factors.row_of[i], factors.rank * block.rows),
            factor_of(factors.of_cols, factors.col_of[i], factors.rank * block.cols)};
}

void check_factors(const LowRankFactors& factors, const MatrixRef& matrix, const BlockGrid& grid,
                   std::span<const std::int64_t> indices) {
    const auto refuse = [](const std::string& what) {
        throw Error(ErrorCode::invalid_argument, "factors of deltas " + what);
    };
    if (factors.row_of.size() != indices.size() || factors.col_of.size() != indices.size()) {
        refuse("must be named for each of " + std::to_string(indices.size()) + " blocks");
    }
    const auto check = [&](std::span<const std::int32_t> all, std::int64_t which,
                           std::size_t size) {
        if (size == 0 || all.size() % size != 0) {
            refuse("have " + std::to_string(all.size()) + " numbers where each has " +
                   std::to_string(size));
        }
        if (which < 0 || static_cast<std::size_t>(which) >= all.size() / size) {
            refuse("have no number " + std::to_string(which) + " of " +
                   std::to_string(all.size() / size));
        }
    };
    for (std::size_t i = 0; i < indices.size(); ++i) {
        const MatrixRef block = block_of(matrix, grid, static_cast<std::size_t>(indices[i]));
        check(factors.of_rows, factors.row_of[i], factors.rank * block.rows);
        check(factors.of_cols, factors.col_of[i], factors.rank * block.cols);
    }
}

}  // namespace

std::size_t encode_deltas(const MatrixRef& matrix, const BlockGrid& grid,
                          std::span<const std::int64_t> indices, const BaseBlocks& bases,
                          std::span<const std::int64_t> limits, std::optional<double> max_rel_error,
                          std::span<std::byte> arena, std::span<std::int64_t> offsets,
                          std::span<EncodedBlock> encoded, unsigned threads,
                          const LowRankFactors* factors, bool is_transposed) {
    const std::size_t raw = check(matrix, grid, indices, bases);
    if (factors != nullptr) check_factors(*factors, matrix, grid, indices);
    if (limits.size() != indices.size() || offsets.size() != indices.size() ||
        encoded.size() != indices.size()) {
        throw Error(ErrorCode::invalid_argument,
                    "encode_deltas was given limits or results of a wrong size");
    }
    std::size_t at = 0;
    for (std::size_t i = 0; i < indices.size(); ++i) {
        if (limits[i] < 0 || static_cast<std::size_t>(limits[i]) > arena.size() - at) {
            throw Error(ErrorCode::invalid_argument, "the limit " + std::to_string(limits[i]) +
                                                         " of block " + std::to_string(i) +
                                                         " is negative or leaves the arena");
        }
        offsets[i] = static_cast<std::int64_t>(at);
        at += static_cast<std::size_t>(limits[i]);
    }
    parallel_for(indices.size(), kParallelGrain, thread_count(threads, raw, kParallelBytes),
                 [&](std::size_t begin, std::size_t end) {
                     detail::DeltaEncoder encoder;
                     for (std::size_t i = begin; i < end; ++i) {
                         // A new one at the same blocks however many threads there are.
                         if (i % kParallelGrain == 0) encoder = {};
                         const auto room = arena.subspan(static_cast<std::size_t>(offsets[i]),
                                                         static_cast<std::size_t>(limits[i]));
                         const MatrixRef block =
                             block_of(matrix, grid, static_cast<std::size_t>(indices[i]));
                         detail::LowRank low_rank{};
                         detail::BaseMoves moves{is_transposed};
                         if (factors != nullptr) {
                             low_rank = low_rank_of(*factors, block, i);
                             moves.low_rank = &low_rank;
                         }
                         encoded[i] =
                             encoder.encode(block, base_of(bases, i), max_rel_error, room, moves)
                                 .value_or(EncodedBlock{Encoding::delta, 0});
                     }
                 });
    return detail::close_gaps(arena, encoded, offsets);
}

void estimate_deltas(const MatrixRef& matrix, const BlockGrid& grid,
                     std::span<const std::int64_t> indices, const BaseBlocks& bases,
                     std::optional<double> max_rel_error, std::span<std::int64_t> estimates,
                     unsigned threads) {
    const std::size_t raw = check(matrix, grid, indices, bases);
    if (estimates.size() != indices.size()) {
        throw Error(ErrorCode::invalid_argument, "estimate_deltas was given a wrong result");
    }
    parallel_for(indices.size(), kParallelGrain, thread_count(threads, raw, kParallelBytes),
                 [&](std::size_t begin, std::size_t end) {
                     for (std::size_t i = begin; i < end; ++i) {
                         estimates[i] = static_cast<std::int64_t>(estimate_delta(
                             block_of(matrix, grid, static_cast<std::size_t>(indices[i])),
                             base_of(bases, i), max_rel_error));
                     }
                 });
}

}  // namespace pydedup
