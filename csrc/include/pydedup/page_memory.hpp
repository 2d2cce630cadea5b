// SPDX-License-Identifier: Apache-2.0
// Memory for pages that stay: in huge pages of the machine, where the system has them to give.
// Products walk over blocks faster than 4 KiB pages can be looked up, in a virtual machine above
// all (EPYC, 4096 x 4096 f32, two threads: 1.4 times for 8 rows of x).
#pragma once

#include <cstddef>
#include <memory>

namespace pydedup {

/// Uninitialised memory of `size` bytes at a multiple of 64, given back when the last copy of the
/// result goes, on any thread; in a forked child the memory stays as it is. Nothing for a size that
/// would waste a quarter or more of its place (below 3/4 MiB, and from 1 to 2 MiB), and when
/// there is no memory: the caller then keeps what it has. Safe between threads.
[[nodiscard]] std::shared_ptr<std::byte> page_memory(std::size_t size) noexcept;

/// The same for any size, of ordinary memory where a page has no place of its own; nothing only
/// when there is no memory.
[[nodiscard]] std::shared_ptr<std::byte> any_page_memory(std::size_t size) noexcept;

}  // namespace pydedup
