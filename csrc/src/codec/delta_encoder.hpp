// SPDX-License-Identifier: Apache-2.0
// Deltas of several blocks of a matrix. Private to codec/.
#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "codec/delta_pair.hpp"
#include "codec/delta_plan.hpp"
#include "pydedup/codec.hpp"

namespace pydedup::detail {

/// encode_delta() for one block after another: what was planned for one serves the next, if that
/// is like it. So what a block becomes depends on those before it.
class DeltaEncoder {
  public:
    DeltaEncoder();
    std::optional<EncodedBlock> encode(const MatrixRef& block, const MatrixRef& base,
                                       std::optional<double> max_rel_error,
                                       std::span<std::byte> out, const BaseMoves& moves = {});

  private:
    // What a delta says of moves of its base.
    struct Moved {
        std::uint8_t version = 0;  ///< the oldest that can; 0 if there is nothing to say
        Sink bytes;
    };

    Sink encode_smaller(const Pair& pair, Dtype dtype, std::optional<double> max_rel_error,
                        std::size_t limit, const Moved& moved);

    std::optional<DeltaPlan> exact_;
    std::optional<DeltaPlan> exact_masked_;
    std::optional<DeltaPlan> quantised_;
    std::optional<DeltaPlan> quantised_masked_;
};

}  // namespace pydedup::detail
