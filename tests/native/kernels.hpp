// SPDX-License-Identifier: Apache-2.0
// What tests of kernels share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "dispatch/cpu_features.hpp"
#include "dispatch/dispatch.hpp"
#include "pydedup/cpu.hpp"

namespace pydedup::testing {

/// The kernels that this machine runs, the reference included, and those of other machines among
/// them that it can run.
inline std::vector<const KernelTable*> runnable_kernels() {
    std::vector<const KernelTable*> tables;
    for (const KernelInfo& info : kernel_infos()) {
        if (!info.built || !info.runnable) continue;
        tables.push_back(&kernels_named(info.name));
        if (info.name == "avx2") {
            tables.push_back(avx2_kernels(!cpu_features().slow_bit_deposit));
        }
        if (info.name == "amx") tables.push_back(amx_kernels(!cpu_features().slow_f32_in_tiles));
    }
    return tables;
}

inline std::vector<std::uint8_t> random_bytes(std::size_t count, std::mt19937_64& random) {
    std::vector<std::uint8_t> bytes(count);
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
    return bytes;
}

/// Bytes of a geometric distribution: the smaller `decay`, the more entropy each has.
inline std::vector<std::uint8_t> skewed_bytes(std::size_t count, double decay,
                                              std::mt19937_64& random) {
    std::geometric_distribution<int> draw(decay);
    std::vector<std::uint8_t> bytes(count);
    for (std::uint8_t& byte : bytes) {
        byte = static_cast<std::uint8_t>(90 + std::min(draw(random), 160));
    }
    return bytes;
}

}  // namespace pydedup::testing
