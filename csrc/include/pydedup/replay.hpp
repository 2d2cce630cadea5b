// SPDX-License-Identifier: Apache-2.0
// A recorded trace, replayed through a replacement policy or through what nobody can beat.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "pydedup/replacement.hpp"

namespace pydedup {

struct ReplayTrace {
    std::span<const std::int64_t> pages;   ///< each use
    std::span<const std::uint32_t> bytes;  ///< of the page of each use; one page, one size
    std::span<const std::uint32_t> calls;  ///< how many calls had begun before each use; ascending
    std::span<const std::int64_t> owners;  ///< of each call
};

struct ReplayResult {
    std::uint64_t hits, misses;
    std::uint64_t missed_bytes;
    std::uint64_t missed_calls;  ///< with a miss between their beginning and that of the next
};

/// Replays a trace through a pool of `budget_bytes` that is empty at first. Who owns a page is
/// known from the start, as the store knows it: whoever uses it anywhere in the trace. Without a
/// policy, the page whose next use is farthest away goes (Belady, 1966): for pages of one size no
/// policy has fewer misses. Throws Error{invalid_argument} when the columns do not fit together,
/// calls do not ascend, a page has two sizes, or is larger than the budget.
[[nodiscard]] ReplayResult replay(const ReplayTrace& trace, std::size_t budget_bytes,
                                  std::optional<ReplacementPolicy> policy);

}  // namespace pydedup
