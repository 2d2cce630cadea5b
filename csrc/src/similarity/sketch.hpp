// SPDX-License-Identifier: Apache-2.0
// A block's sketch: its root mean square, and projections of the block divided by it, as integers.
//
// A block of n elements is read as strips of up to 1,024 elements (whole rows, each starting at a
// group of 16 lanes, or pieces of a long row). Strip s is folded into 1,024 buckets: position p
// goes to bucket p ^ move[s] with a random sign. For any difference of two blocks that is a count
// sketch (Charikar, Chen, Farach-Colton 2002): two positions meet with a chance of at most 1/1,024,
// so the squared length is kept with a relative variance of at most 2/1,024, whatever the
// difference looks like. Then H D3 H D2 G mixes the buckets, H the Walsh-Hadamard transform, G one
// within each lane, and D random signs, as in Ailon and Chazelle 2009 (and with three rounds as in
// Andoni et al. 2015): each output is a sum of 1,024 entries of about equal size with random signs.
// Two rounds would not do: for a difference of two equal entries, outputs come in equal pairs.
//
// So a projection of a unit difference is Gaussian for all that a hash can tell, and different
// projections are uncorrelated. Only additions, sign changes, one multiplication and one division
// by a square root occur, all correctly rounded, in a fixed order: sketches do not depend on the
// kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/similarity_kernels.hpp"
#include "pydedup/similarity.hpp"

namespace pydedup::similarity {

/// Projections are kept as multiples of 1 / kSketchUnit of the block's length, up to +-kSketchMost.
inline constexpr int kSketchUnit = 2048;
inline constexpr int kSketchMost = 16383;

enum class Kind : std::uint8_t { normal, zero, not_finite };

class Sketcher {
  public:
    /// `projections` is a multiple of 32, at most 512.
    Sketcher(std::size_t rows, std::size_t cols, Dtype dtype, std::size_t projections,
             std::uint64_t seed);

    [[nodiscard]] std::size_t projections() const noexcept { return projections_; }
    [[nodiscard]] std::size_t memory_bytes() const noexcept {
        return signs_.capacity() * sizeof(std::uint32_t) +
               moves_.capacity() * sizeof(std::uint16_t);
    }

    /// Where the elements of strips lie for a distance of rows; made once per batch.
    struct Plan {
        FoldStrip strip, last;
        std::size_t stride;  // of rows, in bytes
        std::size_t pitch;   // of strips
    };
    [[nodiscard]] Plan plan(std::size_t row_stride, std::size_t item) const;

    /// Writes the projections and the root mean square of block `index`. Zero and not finite blocks
    /// have projections of 0; the root mean square is 0 or NaN.
    Kind sketch(const BlockBatch& blocks, const Plan& plan, std::size_t index, std::int16_t* out,
                double& rms) const;

  private:
    void fold(const std::byte* block, const Plan& plan, Fold kernel, std::ptrdiff_t ahead,
              float* buckets, double* squares) const;
    Kind sketch_rare(const std::byte* block, const BlockBatch& blocks, std::int16_t* out,
                     double& rms) const;
    void finish(float* buckets, double squares, std::int16_t* out) const;

    std::size_t rows_, cols_;
    std::size_t projections_;
    std::size_t outputs_;         // of the last transform: projections_ up to a power of two
    std::size_t rows_per_strip_;  // 0: rows are longer than a strip
    std::size_t strips_;
    Dtype dtype_;
    std::vector<std::uint32_t> signs_;  // of the strips, then of the two transforms
    std::vector<std::uint16_t> moves_;
};

/// Number `index` of the random sequence of a seed (SplitMix64), the same everywhere.
[[nodiscard]] constexpr std::uint64_t random_word(std::uint64_t seed,
                                                  std::uint64_t index) noexcept {
    std::uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15ULL;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
}

/// Seeds of unrelated sequences from one: streams of neighbouring seeds must not be shifts of each
/// other.
[[nodiscard]] constexpr std::uint64_t stream_seed(std::uint64_t seed,
                                                  std::uint64_t stream) noexcept {
    return random_word(random_word(seed, stream) ^ 0xD1B54A32D192ED03ULL, 0);
}

}  // namespace pydedup::similarity
