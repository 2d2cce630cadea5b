// SPDX-License-Identifier: Apache-2.0
// __builtin_cpu_supports asks CPUID and XGETBV: a feature whose registers the operating system does
// not save counts as absent (test_dispatch.cpp asks XGETBV by itself).
#include "dispatch/cpu_features.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pydedup {
namespace {

#if defined(__x86_64__)
// AMD's family 19h is Zen 3, without AVX-512, and Zen 4, with 256-bit data paths for it.
bool is_amd_family_19h() noexcept {
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    if (__get_cpuid(0, &eax, &ebx, &ecx, &edx) == 0 || ebx != signature_AMD_ebx ||
        ecx != signature_AMD_ecx || edx != signature_AMD_edx) {
        return false;
    }
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return false;
    const unsigned base = (eax >> 8) & 0xFU;
    const unsigned extended = (eax >> 20) & 0xFFU;
    return base == 0xF && base + extended == 0x19;
}

// Clang before 18 does not know the name "f16c". It uses the registers of AVX, no others.
bool has_f16c() noexcept {
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
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
    has.avx512_in_halves = has.avx512 && is_amd_family_19h();
#elif defined(__aarch64__)
    has.neon = true;  // part of the architecture, and of what Linux saves
#endif
    return has;
}

}  // namespace pydedup
