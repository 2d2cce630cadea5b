// SPDX-License-Identifier: Apache-2.0
// What the parts of this folder share: checks of batches, how work is split, plain conversion.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

#include "base/parallel.hpp"
#include "dispatch/dispatch.hpp"
#include "pydedup/error.hpp"
#include "pydedup/similarity.hpp"

namespace pydedup::similarity {

// Below this a second thread costs more than it saves (2-core EPYC: 20 us against 15 GB/s).
inline constexpr std::size_t kBytesPerThread = std::size_t{1} << 19;

[[nodiscard]] inline bool is_float(Dtype dtype) noexcept {
    return dtype == Dtype::f32 || dtype == Dtype::f64 || dtype == Dtype::f16 ||
           dtype == Dtype::bf16;
}

[[nodiscard]] inline const ElementKernels& element_kernels(Dtype dtype) {
    const SimilarityKernels& all = kernels().similarity;
    switch (dtype) {
        case Dtype::f64:
            return all.f64;
        case Dtype::f16:
            return all.f16;
        case Dtype::bf16:
            return all.bf16;
        default:
            return all.f32;
    }
}

[[nodiscard]] inline std::size_t block_bytes(const BlockBatch& blocks) noexcept {
    return blocks.rows * blocks.cols * item_bytes(blocks.dtype);
}

template <class T>
void check_count(std::size_t have, T want, const char* what, const char* per) {
    if (have != static_cast<std::size_t>(want)) {
        throw Error(ErrorCode::invalid_argument,
                    std::to_string(have) + " " + what + " for " + std::to_string(want) + " " + per);
    }
}

/// That the results of `count` blocks have `each` places each. (The product may be beyond all
/// numbers: a batch may be one block many times.)
inline void check_places(std::size_t have, std::size_t count, std::size_t each, const char* what,
                         const char* per) {
    std::size_t want = 0;
    if (__builtin_mul_overflow(count, each, &want)) {
        throw Error(ErrorCode::invalid_argument, std::to_string(count) + " blocks with " +
                                                     std::to_string(each) + " " + per +
                                                     " each are more than memory can hold");
    }
    check_count(have, want, what, per);
}

/// parallel_for over blocks, as many threads as their bytes are worth.
template <class Body>
void for_blocks(std::size_t count, std::size_t bytes_each, unsigned threads, const Body& body) {
    const std::size_t useful = count * bytes_each / kBytesPerThread + 1;
    const auto workers =
        static_cast<unsigned>(std::min<std::size_t>(useful, thread_count(threads)));
    const std::size_t grain = std::clamp<std::size_t>(count / (std::size_t{workers} * 8), 1, 256);
    parallel_for(count, grain, workers, body);
}

/// The elements of a block in f64, for the rare block that f32 sums cannot hold.
void widen_block(const std::byte* block, const BlockBatch& shape, double* out);

}  // namespace pydedup::similarity
