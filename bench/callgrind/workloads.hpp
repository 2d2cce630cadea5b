// SPDX-License-Identifier: Apache-2.0
// What the gate counts: each kernel once, on a fixed input, small enough for valgrind (some 50
// times slower than the machine) and large enough that a call costs nothing beside it.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace gate {

struct Workload {
    std::string name;
    /// Makes the input and returns the call that is counted. One thread, no allocation that
    /// depends on anything but the input.
    std::function<std::function<void()>()> prepare;
};

[[nodiscard]] std::vector<Workload> workloads();

/// Keeps the compiler from removing what computes `value`.
template <class T>
void keep(const T& value) {
    asm volatile("" : : "r,m"(value) : "memory");
}

}  // namespace gate
