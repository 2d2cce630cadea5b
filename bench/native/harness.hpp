// SPDX-License-Identifier: Apache-2.0
// Named workloads, each timed over many rounds after a warm-up. The median is reported with the
// spread (half of the distance between the quartiles, in percent of the median): a machine that is
// shared makes single numbers worthless.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace bench {

struct Workload {
    std::string name;
    std::string what;  ///< one line for people
    double bytes;      ///< bytes that one round reads, 0 when that says nothing
    double flops;      ///< multiplications and additions of one round, 0 likewise
    double items;      ///< blocks, say, of one round; 0 likewise
    std::function<void()> round;
};

struct Result {
    std::string name;
    std::string what;
    double seconds;  ///< median of a round
    double spread;   ///< percent
    std::size_t rounds;
    double gb_per_second;
    double gflop_per_second;
    double items_per_second;
};

/// Makes a workload only when it is wanted: their data is large.
struct Entry {
    std::string name;
    std::function<Workload()> make;
};

[[nodiscard]] Result run(const Workload& workload, double seconds);

/// Keeps the compiler from removing what computes `value`.
template <class T>
void keep(const T& value) {
    asm volatile("" : : "r,m"(value) : "memory");
}

/// The machine's own limits, measured like any workload.
struct Machine {
    double read_gb_per_second;     ///< summing a buffer far larger than the caches, one thread
    double peak_gflop_per_second;  ///< independent f32 multiply-adds in registers, one thread
};
[[nodiscard]] Machine measure_machine(double seconds);

[[nodiscard]] std::vector<Entry> hash_entries();
[[nodiscard]] std::vector<Entry> codec_entries();
[[nodiscard]] std::vector<Entry> packing_entries();
[[nodiscard]] std::vector<Entry> gemm_entries();

}  // namespace bench
