// SPDX-License-Identifier: Apache-2.0
// How many threads a product is worth.
#pragma once

#include <algorithm>

#include "base/parallel.hpp"

namespace pydedup::detail {

/// Multiply-adds below which a second thread costs more than it brings (25 us to wake one; measured
/// on an EPYC with 2 cores).
inline constexpr double kMinWorkPerThread = 1 << 19;

/// As many threads as were requested (0: the default), but no more than the work is worth.
[[nodiscard]] inline unsigned useful_threads(unsigned requested, double multiply_adds) noexcept {
    const double useful = std::max(multiply_adds / kMinWorkPerThread, 1.0);
    return static_cast<unsigned>(std::min<double>(thread_count(requested), useful));
}

}  // namespace pydedup::detail
