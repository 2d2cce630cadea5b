// SPDX-License-Identifier: Apache-2.0
// Fork-join over an index range, on threads that stay: making one takes up to a millisecond until
// it runs, waking one 25 us.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>

#include "pydedup/cpu.hpp"

namespace pydedup {

/// Threads to use: `requested`, or the default when 0.
[[nodiscard]] inline unsigned thread_count(unsigned requested) noexcept {
    return requested != 0 ? requested : default_threads();
}

/// The same for work on `bytes`: one, unless it was `requested` otherwise or there are `enough`.
[[nodiscard]] inline unsigned thread_count(unsigned requested, std::size_t bytes,
                                           std::size_t enough) noexcept {
    return requested == 0 && bytes < enough ? 1 : thread_count(requested);
}

namespace detail {

/// Calls run(context) here, and meanwhile on up to `helpers` other threads. Returns when all calls
/// that began have ended; a helper that comes too late never begins. Safe between threads, from
/// within `run`, and in a forked child.
void run_with_helpers(unsigned helpers, void (*run)(void*) noexcept, void* context) noexcept;

}  // namespace detail

/// Calls body(begin, end) over [0, count) in pieces of `grain`, on up to `threads` threads (the
/// caller's is one of them). The first exception is rethrown here after all have ended.
template <class Body>
void parallel_for(std::size_t count, std::size_t grain, unsigned threads, const Body& body) {
    const std::size_t pieces = count / grain + (count % grain != 0 ? 1 : 0);
    const auto workers = static_cast<unsigned>(std::min<std::size_t>(threads, pieces));
    if (workers <= 1) {
        if (count != 0) body(std::size_t{0}, count);
        return;
    }
    struct Work {
        const Body& body;
        std::size_t count, grain, pieces;
        std::atomic<std::size_t> next{0};
        std::atomic<bool> failed{false};
        std::exception_ptr error{};

        void run() noexcept {
            for (std::size_t piece = next++; piece < pieces && !failed; piece = next++) {
                try {
                    body(piece * grain, std::min(count, (piece + 1) * grain));
                } catch (...) {
                    if (!failed.exchange(true)) error = std::current_exception();
                }
            }
        }
    } work{body, count, grain, pieces};
    detail::run_with_helpers(
        workers - 1, [](void* context) noexcept { static_cast<Work*>(context)->run(); }, &work);
    if (work.error) std::rethrow_exception(work.error);
}

}  // namespace pydedup
