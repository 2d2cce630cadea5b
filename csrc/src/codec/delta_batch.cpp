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

}  // namespace

std::size_t encode_deltas(const MatrixRef& matrix, const BlockGrid& grid,
                          std::span<const std::int64_t> indices, const BaseBlocks& bases,
                          std::span<const std::int64_t> limits, std::optional<double> max_rel_error,
                          std::span<std::byte> arena, std::span<std::int64_t> offsets,
                          std::span<EncodedBlock> encoded, unsigned threads) {
    const std::size_t raw = check(matrix, grid, indices, bases);
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
                         encoded[i] = encoder
                                          .encode(block_of(matrix, grid,
                                                           static_cast<std::size_t>(indices[i])),
                                                  base_of(bases, i), max_rel_error, room)
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
