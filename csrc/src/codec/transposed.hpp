// SPDX-License-Identifier: Apache-2.0
// A base whose rows are the columns of its deltas: what one framework keeps as (outputs, inputs)
// another keeps as (inputs, outputs). Private to codec/.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pydedup::detail {

/// Writes rows * cols elements of 1, 2, 4 or 8 bytes as cols * rows elements elsewhere.
void transpose(const std::uint8_t* from, std::size_t rows, std::size_t cols, std::size_t item_bytes,
               std::uint8_t* to) noexcept;

}  // namespace pydedup::detail
