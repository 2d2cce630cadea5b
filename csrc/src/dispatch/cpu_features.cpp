// SPDX-License-Identifier: Apache-2.0
// __builtin_cpu_supports asks CPUID and XGETBV: a feature whose registers the operating system does
// not save counts as absent (test_dispatch.cpp asks XGETBV by itself).
#include "dispatch/cpu_features.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pydedup {
namespace {

#if defined(__x86_64__)
bool is_made_by(unsigned name_b, unsigned name_c, unsigned name_d) noexcept {
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    return __get_cpuid(0, &eax, &ebx, &ecx, &edx) != 0 && ebx == name_b && ecx == name_c &&
           edx == name_d;
}

// The family of a CPU by AMD, 0 for others: 17h is Zen to Zen 2, 19h Zen 3 and Zen 4.
unsigned amd_family() noexcept {
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    if (!is_made_by(signature_AMD_ebx, signature_AMD_ecx, signature_AMD_edx)) return 0;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return 0;
    const unsigned base = (eax >> 8) & 0xFU;
    const unsigned extended = (eax >> 20) & 0xFFU;
    return base == 0xF ? base + extended : base;
}

// Sapphire Rapids and Emerald Rapids.
bool is_intel_of_2023() noexcept {
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    if (!is_made_by(signature_INTEL_ebx, signature_INTEL_ecx, signature_INTEL_edx)) return false;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return false;
    const unsigned family = (eax >> 8) & 0xFU;
    const unsigned model = (eax >> 4 & 0xFU) | (eax >> 12 & 0xF0U);
    return family == 6 && (model == 143 || model == 207);
}

// Clang before 18 does not know the name "f16c". It uses the registers of AVX, no others.
bool has_f16c() noexcept {
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// Whether this process may use the matrix registers of AMX: Linux (5.16) grants them to a process
// that asks, and saves 8 KiB more per thread from its first use of them on.
bool may_use_amx() noexcept {
#if defined(__linux__)
    constexpr unsigned kBf16 = 1U << 22;
    constexpr unsigned kTile = 1U << 24;
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kBf16) != 0 &&
           (edx & kTile) != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

}  // namespace

CpuFeatures cpu_features() noexcept {
    CpuFeatures has;
#if defined(__x86_64__)
    __builtin_cpu_init();
    has.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() &&
               __builtin_cpu_supports("bmi2");
    has.avx512 = has.avx2 && __builtin_cpu_supports("avx512f") &&
                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl");
    has.avx512bf16 = has.avx512 && __builtin_cpu_supports("avx512bf16");
    has.amx = has.avx512 && may_use_amx();
    has.slow_bf16_pairs = is_made_by(signature_INTEL_ebx, signature_INTEL_ecx, signature_INTEL_edx);
    has.slow_f32_in_tiles = is_intel_of_2023();
    const unsigned amd = amd_family();
    has.avx512_in_halves = has.avx512 && amd == 0x19;
    has.slow_bit_deposit = amd != 0 && amd < 0x19;
#elif defined(__aarch64__)
    has.neon = true;  // part of the architecture, and of what Linux saves
#endif
    return has;
}

}  // namespace pydedup
