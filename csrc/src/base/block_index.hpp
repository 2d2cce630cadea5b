// SPDX-License-Identifier: Apache-2.0
// Which block of a grid a caller means.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "pydedup/error.hpp"

namespace pydedup::detail {

/// That there is a block `index` in a grid of `n_blocks`.
inline void check_block_index(std::int64_t index, std::size_t n_blocks) {
    if (index < 0 || static_cast<std::size_t>(index) >= n_blocks) {
        throw Error(ErrorCode::invalid_argument, "block " + std::to_string(index) +
                                                     " is outside of a grid of " +
                                                     std::to_string(n_blocks) + " blocks");
    }
}

}  // namespace pydedup::detail
