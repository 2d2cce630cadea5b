// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace pydedup {

/// What the CPU has and the operating system saves the registers for.
struct CpuFeatures {
    bool avx2 = false;        ///< AVX2, FMA, F16C, BMI2 and YMM state
    bool avx512 = false;      ///< AVX-512 F, BW, DQ, VL, all of avx2, and ZMM state
    bool avx512bf16 = false;  ///< AVX-512-BF16, all of avx512
    bool neon = false;        ///< ASIMD
    /// The CPU computes 512 bits as two times 256, so that AVX-512 gains by its registers, masks
    /// and fewer instructions alone.
    bool avx512_in_halves = false;
};

[[nodiscard]] CpuFeatures cpu_features() noexcept;

}  // namespace pydedup
