// SPDX-License-Identifier: Apache-2.0
// A base moved by a product of two thin matrices, as low-rank adapters that were merged into a
// model do (Hu et al., LoRA, ICLR 2022): a delta on the moved base has little left to say. The
// factors are whole numbers, so their product is exact in f64 in whatever order it is summed.
// Private to codec/ and to the page format, which keeps a factor that blocks have in common once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "codec/delta_model.hpp"
#include "pydedup/codec.hpp"

namespace pydedup::detail {

/// rank * n numbers, one column of the factor behind the other.
using Factor = std::span<const std::int32_t>;

/// Element (i, j) of a base becomes itself + 2^exponent * sum over k of rows[k][i] * cols[k][j].
struct LowRank {
    unsigned rank;
    int exponent;
    Factor of_rows;  ///< rank * rows
    Factor of_cols;  ///< rank * cols
};

/// The same with the memory for it, as it is read.
struct ReadLowRank {
    unsigned rank = 0;
    int exponent = 0;
    std::vector<std::int32_t> of_rows;
    std::vector<std::int32_t> of_cols;

    [[nodiscard]] LowRank view() const noexcept { return {rank, exponent, of_rows, of_cols}; }
};

/// Throws Error{invalid_argument} unless a delta can have these factors.
void check_low_rank(const LowRank& low_rank, std::size_t rows, std::size_t cols);

/// moved = base + product, rounded to the dtype; both have rows * cols elements of `dtype`, which
/// is f64, f32, f16 or bf16.
void add_low_rank(const LowRank& low_rank, const std::uint8_t* base, std::size_t rows,
                  std::size_t cols, Dtype dtype, std::uint8_t* moved);

/// Rank and exponent, and both factors; returns the bytes of these.
std::size_t put_low_rank(Sink& sink, const LowRank& low_rank);

/// Says that there are none, where a delta may have some.
void put_no_low_rank(Sink& sink);

/// Whether put_no_low_rank() wrote what comes next, which is then skipped.
[[nodiscard]] bool skip_no_low_rank(Source& source) noexcept;

/// Reads what put_low_rank() wrote, or a page made of it, as far as it moves anything. `before` are
/// the bytes in front of the block, which begins at `block`. Returns nullptr, or what is wrong.
[[nodiscard]] const char* get_low_rank(Source& source, std::size_t rows, std::size_t cols,
                                       const std::uint8_t* block, std::size_t before,
                                       ReadLowRank& low_rank);

/// Where a delta names its factors: the bytes of each, wherever they lie, and what is around them.
struct FactorPlaces {
    std::span<const std::byte> head;
    std::span<const std::byte> of_rows;
    std::span<const std::byte> of_cols;
    std::span<const std::byte> tail;
};

/// Bytes of a delta without the factors that follow in it.
[[nodiscard]] std::size_t bytes_besides_factors(const BlockView& delta);

/// nullopt for deltas without factors, and for what does not decode.
[[nodiscard]] std::optional<FactorPlaces> find_factors(const BlockView& delta);

}  // namespace pydedup::detail
