// SPDX-License-Identifier: Apache-2.0
// What the machine is, and its limits (the roofs of a roofline), measured like any workload.
#pragma once

#include <string>

namespace bench {

struct Limits {
    double read_gb_per_second;     ///< reading a buffer far larger than the caches
    double peak_gflop_per_second;  ///< independent f32 multiply-adds in registers
};

struct Machine {
    std::string cpu;
    unsigned cores;
    std::string compiler;
    std::string version;  ///< of pydedup
    std::string commit;   ///< of the sources, "-dirty" when they were changed; "" outside of git
    std::string date;     ///< UTC, ISO 8601
    Limits one, two;      ///< with one thread and with two

    /// What a workload of so many threads is held against. More than two count as two: pydedup's
    /// benchmarks use no more.
    [[nodiscard]] const Limits& limits(unsigned threads) const noexcept {
        return threads < 2 ? one : two;
    }
};

/// Takes about four times `seconds`.
[[nodiscard]] Machine measure_machine(double seconds);

}  // namespace bench
