// SPDX-License-Identifier: Apache-2.0
// The elements of one stored block, whatever its encoding. Private to storage/.
#pragma once

#include <cstddef>

#include "gemm/aligned_array.hpp"
#include "pydedup/codec.hpp"

namespace pydedup::detail {

/// The block's rows, without gaps and of any alignment; `scratch` keeps them where they had to be
/// decoded. It is not cleared: a damaged slot may claim 4 GiB, which nobody has touched when its
/// bytes turn out to be no such block.
[[nodiscard]] inline const std::byte* rows_of(const BlockView& block, Scratch<std::byte>& scratch) {
    if (block.encoding == Encoding::raw) return block.data;
    std::byte* const rows = scratch.at_least(block.raw_bytes());
    decode_block(block, rows, block.row_bytes());
    return rows;
}

}  // namespace pydedup::detail
