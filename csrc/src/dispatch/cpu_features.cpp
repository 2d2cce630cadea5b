// SPDX-License-Identifier: Apache-2.0
// __builtin_cpu_supports asks CPUID and XGETBV: a feature whose registers the operating system does
// not save counts as absent.
#include "dispatch/cpu_features.hpp"

namespace pydedup {

CpuFeatures cpu_features() noexcept {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    return {avx2, avx512};
#else
    return {false, false};
#endif
}

}  // namespace pydedup
