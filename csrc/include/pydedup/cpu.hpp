// SPDX-License-Identifier: Apache-2.0
// Which kernel implementation runs, and why. Thread-safe: the choice is made once, at first use.
#pragma once

#include <string>
#include <vector>

namespace pydedup {

struct KernelInfo {
    std::string name;
    bool built;        ///< compiled into this library
    bool runnable;     ///< this CPU and operating system can execute it
    std::string note;  ///< why it cannot be used, or what speaks for it
};

/// Every kernel that this version knows, reference first.
[[nodiscard]] std::vector<KernelInfo> kernel_infos();

/// Name of the kernel in use. Throws Error{kernel_unavailable} when PYDEDUP_KERNEL demands one
/// that is unknown, not built, or not runnable here.
[[nodiscard]] std::string active_kernel();

/// Why `active_kernel()` is the one in use.
[[nodiscard]] std::string active_kernel_reason();

/// Threads of calls that ask for no number: PYDEDUP_THREADS as it was when it was first needed, or
/// one per core where that is no number from 1 on; no more than limit_threads() allows.
[[nodiscard]] unsigned default_threads() noexcept;

/// Bounds default_threads() of calls that this thread makes from now on, 0 for no bound. Returns
/// the bound before.
unsigned limit_threads(unsigned most) noexcept;

}  // namespace pydedup
