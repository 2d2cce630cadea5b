// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace pydedup {

/// What the CPU has and the operating system saves the registers for.
struct CpuFeatures {
    bool avx2 = false;        ///< AVX2, FMA, F16C, BMI2 and YMM state
    bool avx512 = false;      ///< AVX-512 F, BW, DQ, VL, all of avx2, and ZMM state
    bool avx512bf16 = false;  ///< AVX-512-BF16, all of avx512
    bool amx = false;         ///< AMX-TILE and AMX-BF16, granted to this process, all of avx512
    bool neon = false;        ///< ASIMD
    /// The CPU computes 512 bits as two times 256, so that AVX-512 gains by its registers, masks
    /// and fewer instructions alone.
    bool avx512_in_halves = false;
    /// VDPBF16PS is begun every other cycle, where two f32 ones are begun in each: Intel's cores
    /// (Emerald Rapids: 512 rows of x, 4096 x 4096: 133 GFLOP/s by pairs, 206 in f32).
    bool slow_bf16_pairs = false;
    /// In matrix registers six products of bf16 numbers take longer than one of f32 does by AVX-512
    /// (Emerald Rapids: 500 to 560 GFLOP/s per core in bf16, 103 in f32; with zeros four times as
    /// many: it is power). Sapphire Rapids, of the same core, is taken for as slow.
    bool slow_f32_in_tiles = false;
    /// PDEP and PEXT are microcode, some 4 cycles for each bit of the mask: AMD before Zen 3.
    bool slow_bit_deposit = false;
};

[[nodiscard]] CpuFeatures cpu_features() noexcept;

}  // namespace pydedup
