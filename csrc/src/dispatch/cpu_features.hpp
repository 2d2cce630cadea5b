// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace pydedup {

/// What the CPU has and the operating system saves the registers for.
struct CpuFeatures {
    bool avx2;    ///< AVX2, FMA, F16C, BMI2 and YMM state
    bool avx512;  ///< AVX-512 F, BW, DQ, VL, all of avx2, and ZMM state
};

[[nodiscard]] CpuFeatures cpu_features() noexcept;

}  // namespace pydedup
