// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "kernels/rows_kernels.hpp"

namespace pydedup {

/// Whether both add and pick alike rows of numbers that come out of these 700 bytes. Private to
/// dispatch/.
[[nodiscard]] bool same_rows_summed(const RowsKernels& rows, const RowsKernels& reference,
                                    std::span<const std::uint8_t> question) noexcept;

}  // namespace pydedup
