// SPDX-License-Identifier: Apache-2.0
// A block beside its base: what encoding and estimating a delta begin with. Private to codec/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "codec/delta_plan.hpp"
#include "codec/delta_room.hpp"
#include "codec/low_rank.hpp"
#include "codec/zero_mask.hpp"
#include "pydedup/codec.hpp"

namespace pydedup::detail {

/// A block that is to be a delta, with what its base gives for it.
struct Pair {
    std::size_t rows;
    std::size_t cols;
    Dtype dtype;
    const std::uint8_t* block;  ///< rows * cols elements
    const std::uint8_t* base;   ///< the same, of the block's dtype
    Dtype base_dtype;
    std::uint32_t check;
    bool masked = false;  ///< the base is 0 where the block is

    [[nodiscard]] std::size_t count() const noexcept { return rows * cols; }
};

/// Throw Error{invalid_argument} unless a delta can be made of it.
void check_pair(const MatrixRef& block, const MatrixRef& base, bool is_transposed = false);
void check_error(std::optional<double> max_rel_error);

/// Part of the base's hash: stands in the delta's header, so that another base is noticed.
[[nodiscard]] std::uint32_t check_of(const std::uint8_t* base, std::size_t rows,
                                     std::size_t row_bytes);

/// What a base goes through before differences to it are taken, in this order.
struct BaseMoves {
    bool is_transposed = false;
    const LowRank* low_rank = nullptr;  ///< what is added, if anything
};

/// Contiguous copies where they are needed, and the memory for them. The base is always copied: it
/// is looked at again and again, and must be the same each time, also when somebody writes into it
/// meanwhile; else a code may lack a symbol that is then written, or be written longer than the
/// room that was made for it.
class PairOf {
  public:
    PairOf(const MatrixRef& block, const MatrixRef& base, const BaseMoves& moves = {});
    Pair pair;

  private:
    std::unique_ptr<std::uint8_t[]> memory_;
};

/// A pair whose base has 0 where the block has it; without a mask where that is not worth one.
struct MaskedPair {
    explicit MaskedPair(const Pair& of);
    Pair pair;
    std::optional<ZeroMask> mask;

  private:
    std::unique_ptr<std::uint8_t[]> base_;
};

/// Whether a mask is always worth it: exact differences of floats to 0 have all bits of what is
/// gone. Those of integers may be as small as all others, and quantised ones are a symbol.
[[nodiscard]] bool masks_win(Dtype dtype, std::optional<double> max_rel_error) noexcept;

/// Whether so many elements are as in the base, bit by bit, that an exact delta may be smaller than
/// one within a bound, whose differences have more values.
[[nodiscard]] bool keeps_many(const Pair& pair) noexcept;

/// About how many bytes an exact delta takes, without what is said of moves of its base.
[[nodiscard]] std::size_t estimate_exact(const Pair& pair);

/// What take_differences() found.
struct Coded {
    Differences differences;
    unsigned shift = 0;
    std::optional<double> step;
    std::size_t n_changed = 0;
};

/// Differences of a pair into room.z and room.classes; the exact ones, or quantised. False when
/// they cannot be quantised.
[[nodiscard]] bool take_differences(const Pair& pair, std::optional<double> max_rel_error,
                                    const Room& room, Coded& coded);

/// How to write them; symbols and contexts of the elements are in `room` afterwards. As another
/// block was planned where that does as well; `like` then stays, else it becomes this plan.
void plan_pair(const Coded& coded, const Room& room, DeltaPlan& plan,
               std::optional<DeltaPlan>* like = nullptr);

}  // namespace pydedup::detail
