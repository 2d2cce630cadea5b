// SPDX-License-Identifier: Apache-2.0
// Deltas of several blocks of a matrix. Private to codec/.
#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "codec/delta_plan.hpp"
#include "pydedup/codec.hpp"

namespace pydedup::detail {

/// encode_delta() for one block after another: what was planned for one serves the next, if that
/// is like it. So what a block becomes depends on those before it.
class DeltaEncoder {
  public:
    std::optional<EncodedBlock> encode(const MatrixRef& block, const MatrixRef& base,
                                       std::optional<double> max_rel_error,
                                       std::span<std::byte> out);

  private:
    std::optional<DeltaPlan> exact_;
    std::optional<DeltaPlan> quantised_;
};

}  // namespace pydedup::detail
