// SPDX-License-Identifier: Apache-2.0
#include "harness.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <numeric>

namespace bench {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

double at_quantile(const std::vector<double>& sorted, double q) {
    return sorted[static_cast<std::size_t>(q * static_cast<double>(sorted.size() - 1) + 0.5)];
}

// Sums four streams of a buffer; the vectoriser turns this into plain loads and additions.
std::uint64_t sum_buffer(const std::vector<std::uint64_t>& buffer) {
    return std::accumulate(buffer.begin(), buffer.end(), std::uint64_t{0});
}

// Independent chains of 16 lanes: enough for every pipeline, few enough for the registers of AVX2.
using Lanes = float __attribute__((vector_size(64)));
constexpr int kChains = 6;

#if defined(__x86_64__)
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
float multiply_add(std::size_t repeats) {
    Lanes sums[kChains] = {};
    const Lanes factor = Lanes{} + 0.999F;
    const Lanes term = Lanes{} + 0.5F;
    for (std::size_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 6
        for (Lanes& sum : sums) sum = sum * factor + term;
    }
    float total = 0;
    for (const Lanes& sum : sums) total += sum[0];
    return total;
}

}  // namespace

Result run(const Workload& workload, double seconds) {
    workload.round();  // warm-up: page faults, caches, dispatch
    std::vector<double> times;
    const Clock::time_point start = Clock::now();
    while (times.size() < 5 || (seconds_since(start) < seconds && times.size() < 10000)) {
        const Clock::time_point round = Clock::now();
        workload.round();
        times.push_back(seconds_since(round));
    }
    std::sort(times.begin(), times.end());
    const double median = at_quantile(times, 0.5);
    const double spread = 50.0 * (at_quantile(times, 0.75) - at_quantile(times, 0.25)) / median;
    return {workload.name,
            workload.what,
            median,
            spread,
            times.size(),
            workload.bytes / median / 1e9,
            workload.flops / median / 1e9,
            workload.items / median};
}

Machine measure_machine(double seconds) {
    const std::vector<std::uint64_t> buffer(std::size_t{32} << 20, 1);  // 256 MiB
    const Result read = run({"machine.read", "", static_cast<double>(buffer.size() * 8), 0, 0,
                             [&] { keep(sum_buffer(buffer)); }},
                            seconds);
    constexpr std::size_t kRepeats = 200000;
    const double flops = 2.0 * 16 * kChains * kRepeats;
    const Result compute =
        run({"machine.flops", "", 0, flops, 0, [] { keep(multiply_add(kRepeats)); }}, seconds);
    return {read.gb_per_second, compute.gflop_per_second};
}

}  // namespace bench
