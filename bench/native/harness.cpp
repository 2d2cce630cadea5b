// SPDX-License-Identifier: Apache-2.0
#include "harness.hpp"

#include <algorithm>
#include <chrono>

#include "pydedup/page_memory.hpp"

namespace bench {
namespace {

using Clock = std::chrono::steady_clock;

// A round is repeated until it takes this long: the clock alone costs some 50 ns.
constexpr double kShortestSample = 50e-6;

bool smoke_run = false;

double seconds_of(const Workload& workload, std::size_t repeats) {
    const Clock::time_point start = Clock::now();
    for (std::size_t i = 0; i < repeats; ++i) workload.round();
    return std::chrono::duration<double>(Clock::now() - start).count();
}

double at_quantile(const std::vector<double>& sorted, double q) {
    return sorted[static_cast<std::size_t>(q * static_cast<double>(sorted.size() - 1) + 0.5)];
}

Result result_of(const Workload& workload, std::vector<double> times, std::size_t repeats) {
    std::sort(times.begin(), times.end());
    const double median = at_quantile(times, 0.5);
    return {workload.name,
            workload.what,
            workload.threads,
            median,
            50.0 * (at_quantile(times, 0.75) - at_quantile(times, 0.25)) / median,
            times.size() * repeats,
            workload.bytes / median / 1e9,
            workload.flops / median / 1e9,
            workload.items / median};
}

}  // namespace

Result run(const Workload& workload, double seconds) {
    if (seconds <= 0) return result_of(workload, {seconds_of(workload, 1)}, 1);
    workload.round();  // warm-up: page faults, caches, dispatch
    const double once = std::max(seconds_of(workload, 1), 1e-9);
    const auto repeats = static_cast<std::size_t>(std::clamp(kShortestSample / once, 1.0, 1e6));
    std::vector<double> times;
    double total = 0;
    while (times.size() < 5 || (total < seconds && times.size() < 10000)) {
        const double spent = seconds_of(workload, repeats);
        total += spent;
        times.push_back(spent / static_cast<double>(repeats));
    }
    return result_of(workload, std::move(times), repeats);
}

bool smoke() noexcept { return smoke_run; }
void set_smoke(bool on) noexcept { smoke_run = on; }

std::shared_ptr<std::byte> large_memory(std::size_t bytes) {
    if (std::shared_ptr<std::byte> memory = pydedup::page_memory(bytes)) return memory;
    return {new std::byte[bytes], [](const std::byte* at) { delete[] at; }};
}

}  // namespace bench
