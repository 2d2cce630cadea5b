// SPDX-License-Identifier: Apache-2.0
// Named workloads, each timed over many rounds after a warm-up. The median is reported with the
// spread (half of the distance between the quartiles, in percent of the median): a machine that is
// shared makes single numbers worthless. What the machine itself can do is in machine.hpp.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
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
    unsigned threads = 1;  ///< how many it uses: which limits of the machine it is held against
};

struct Result {
    std::string name;
    std::string what;
    unsigned threads;
    double seconds;  ///< median of a round
    double spread;   ///< percent
    std::size_t rounds;
    double gb_per_second;
    double gflop_per_second;
    double items_per_second;
};

/// Makes a workload only when it is wanted: their data are large.
struct Entry {
    std::string name;
    std::function<Workload()> make;
};

/// Times a workload for `seconds`, at least 5 rounds; 0 means one round, to see that it runs.
[[nodiscard]] Result run(const Workload& workload, double seconds);

/// Whether workloads should make little data: they are only tried, not measured (--smoke).
[[nodiscard]] bool smoke() noexcept;
void set_smoke(bool on) noexcept;
[[nodiscard]] inline std::size_t unless_smoke(std::size_t full, std::size_t small) noexcept {
    return smoke() ? small : full;
}

/// Memory for what a workload reads: in huge pages where the system gives them, as the pool keeps
/// pages, numpy its arrays, and as the limit of reading is measured.
[[nodiscard]] std::shared_ptr<std::byte> large_memory(std::size_t bytes);

/// Keeps the compiler from removing what computes `value`.
template <class T>
void keep(const T& value) {
    asm volatile("" : : "r,m"(value) : "memory");
}

// One function per area, in bench_<area>.cpp; main.cpp lists them.
[[nodiscard]] std::vector<Entry> hash_entries();
[[nodiscard]] std::vector<Entry> xxh3_entries();  ///< nothing where xxhash.h was not found
[[nodiscard]] std::vector<Entry> codec_entries();
[[nodiscard]] std::vector<Entry> packing_entries();
[[nodiscard]] std::vector<Entry> gemm_entries();
[[nodiscard]] std::vector<Entry> rows_entries();
[[nodiscard]] std::vector<Entry> conv_entries();
[[nodiscard]] std::vector<Entry> similarity_entries();

}  // namespace bench
