// SPDX-License-Identifier: Apache-2.0
// What a finished part of y still needs: bias and activation, in place.
#pragma once

#include <cstddef>

#include "pydedup/gemm.hpp"

namespace pydedup::detail {

/// row[j] = activation(row[j] + bias[j]) for j < count; `bias` may be nullptr. NaN stays NaN.
template <class T>
void finish_row(T* row, std::size_t count, const T* bias, Activation activation) noexcept;

}  // namespace pydedup::detail
