// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/kernel_table.hpp"

namespace pydedup {

/// Asks a table fixed questions of each group of kernels, and the reference the same. Returns the
/// first group whose answers differ ("hash", "codec", "gemm", "rows", "similarity"), or nullptr
/// when all agree. Takes about half a millisecond, so that every process can afford it.
[[nodiscard]] const char* first_wrong_group(const KernelTable& table) noexcept;

}  // namespace pydedup
