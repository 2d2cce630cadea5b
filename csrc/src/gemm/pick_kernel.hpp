// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/rows_kernels.hpp"

namespace pydedup::detail {

/// What copies elements W, a distance apart, as elements T.
template <class W, class T = W>
[[nodiscard]] RowsKernels::Pick<W, T> pick_kernel(const RowsKernels& kernels) noexcept {
    if constexpr (sizeof(W) == 2) {
        return kernels.pick_bf16;
    } else if constexpr (sizeof(W) == 4) {
        return kernels.pick_f32;
    } else {
        return kernels.pick_f64;
    }
}

}  // namespace pydedup::detail
