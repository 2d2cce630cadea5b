// SPDX-License-Identifier: Apache-2.0
// Blocks whose floats are those of a narrower dtype, as a model of bf16 that was saved in f32: a
// delta of them is one of the narrower dtype (docs/format.md, "Version 2"). Private to codec/.
#pragma once

#include <memory>
#include <optional>

#include "pydedup/types.hpp"

namespace pydedup::detail {

/// Whether a delta of `wide` may be one of `narrow`.
[[nodiscard]] bool is_narrower(Dtype narrow, Dtype wide) noexcept;

/// A block in a narrower dtype, and the memory that it is in.
struct NarrowBlock {
    MatrixRef block;
    std::unique_ptr<std::uint8_t[]> memory;
};

/// The block in the first of bf16, f16 and f32 that is narrower and gives the same bits when it is
/// widened; nullopt when none does.
[[nodiscard]] std::optional<NarrowBlock> narrowed(const MatrixRef& block);

}  // namespace pydedup::detail
