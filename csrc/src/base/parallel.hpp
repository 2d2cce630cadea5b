// SPDX-License-Identifier: Apache-2.0
// Fork-join over an index range. Threads are made per call: no pool survives, so a forked child
// works without care; callers use it only where the work outweighs about 20 us per thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

namespace pydedup {

/// Threads to use: `requested`, or one per core when 0.
[[nodiscard]] inline unsigned thread_count(unsigned requested) noexcept {
    if (requested != 0) return requested;
    const unsigned cores = std::thread::hardware_concurrency();
    return cores == 0 ? 1 : cores;
}

/// Calls body(begin, end) over [0, count) in pieces of `grain`, on `threads` threads (the caller's
/// is one of them). The first exception is rethrown here after all have joined.
template <class Body>
void parallel_for(std::size_t count, std::size_t grain, unsigned threads, const Body& body) {
    const std::size_t pieces = (count + grain - 1) / grain;
    const std::size_t workers = std::min<std::size_t>(threads, pieces);
    if (workers <= 1) {
        if (count != 0) body(std::size_t{0}, count);
        return;
    }
    std::atomic<std::size_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    const auto run = [&] {
        for (std::size_t piece = next++; piece < pieces && !failed; piece = next++) {
            try {
                body(piece * grain, std::min(count, (piece + 1) * grain));
            } catch (...) {
                if (!failed.exchange(true)) error = std::current_exception();
            }
        }
    };
    std::vector<std::jthread> threads_left;
    threads_left.reserve(workers - 1);
    for (std::size_t i = 1; i < workers; ++i) threads_left.emplace_back(run);
    run();
    threads_left.clear();
    if (error) std::rethrow_exception(error);
}

}  // namespace pydedup
