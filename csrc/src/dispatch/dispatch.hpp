// SPDX-License-Identifier: Apache-2.0
// Access to the chosen kernel table, for the areas of the core.
#pragma once

#include <string_view>

#include "kernels/kernel_table.hpp"

namespace pydedup {

/// The table in use. Throws as active_kernel() does.
[[nodiscard]] const KernelTable& kernels();

/// The table of that name, for tests and benchmarks. Throws Error{kernel_unavailable}.
[[nodiscard]] const KernelTable& kernels_named(std::string_view name);

}  // namespace pydedup
