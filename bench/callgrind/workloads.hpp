// SPDX-License-Identifier: Apache-2.0
// What the gate counts: each kernel once, on a fixed input, small enough for valgrind (some 50
// times slower than the machine) and large enough that a call costs nothing beside it.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "pydedup/types.hpp"

namespace gate {

struct Workload {
    std::string name;
    /// Makes the input and returns the call that is counted. One thread, no allocation that
    /// depends on anything but the input.
    std::function<std::function<void()>()> prepare;
};

[[nodiscard]] std::vector<Workload> workloads();
// Parts of it, of workloads_rows.cpp.
[[nodiscard]] std::vector<Workload> rows_workloads();
[[nodiscard]] std::vector<Workload> conv_workloads();

using Buffer = std::shared_ptr<std::vector<std::byte>>;

[[nodiscard]] Buffer make_buffer(std::size_t bytes);

/// Numbers that look like weights, the same with every library.
[[nodiscard]] Buffer weights(std::size_t count, pydedup::Dtype dtype);

/// Keeps the compiler from removing what computes `value`.
template <class T>
void keep(const T& value) {
    asm volatile("" : : "r,m"(value) : "memory");
}

}  // namespace gate
