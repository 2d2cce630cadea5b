// SPDX-License-Identifier: Apache-2.0
// Access to the chosen kernel table, for the areas of the core.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "kernels/kernel_table.hpp"

namespace pydedup {

/// The table in use. Throws as active_kernel() does.
[[nodiscard]] const KernelTable& kernels();

/// The table of that name, for tests and benchmarks. Throws Error{kernel_unavailable}.
[[nodiscard]] const KernelTable& kernels_named(std::string_view name);

/// The avx2 table for a CPU where PDEP is slow, or is not; nullptr where it is not built.
[[nodiscard]] const KernelTable* avx2_kernels(bool slow_bit_deposit) noexcept;

/// The amx table for a CPU where products of f32 numbers, cut into bf16 ones, are slow, or are not;
/// nullptr where it is not built.
[[nodiscard]] const KernelTable* amx_kernels(bool slow_f32_in_tiles) noexcept;

struct KernelCandidate {
    const char* name;
    const KernelTable* table;  ///< nullptr: not built
    bool runnable;
    const char* needs;
    /// Why it is not chosen by itself, though it runs; nullptr where it is.
    const char* slower = nullptr;
};

/// Every kernel that this version knows, in order of preference: the fastest measured one last.
[[nodiscard]] std::span<const KernelCandidate> kernel_candidates();

struct KernelChoice {
    const KernelTable* table = nullptr;
    std::string reason;  ///< why this one
    std::string error;   ///< why none
};

/// Chooses among candidates; `demand` is the value of PYDEDUP_KERNEL, nullptr or empty for none.
/// The rule behind kernels(), without its state, so that tests can ask about other machines.
[[nodiscard]] KernelChoice choose_kernel(std::span<const KernelCandidate> candidates,
                                         const char* demand);

}  // namespace pydedup
