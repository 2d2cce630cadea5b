// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace pydedup {

struct HashKernels {
    /// Digest of rows x row_bytes bytes, rows stride_bytes apart; out[0] low, out[1] high half.
    void (*hash_rows)(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes,
                      std::size_t stride_bytes, std::uint64_t seed, std::uint64_t* out) noexcept;
};

}  // namespace pydedup
