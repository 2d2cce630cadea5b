#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# cross.sh: the core on CPUs that are not here, emulated by QEMU.
#
# Compiles library and native tests for 64-bit Arm and runs all of them, with the scalar and with
# the NEON kernels: what is stored there is what is stored here (the golden files). On x86-64 it then
# runs what kernels are in on two older CPUs, one without AVX and one without AVX-512, where an
# instruction that slipped into the wrong file ends the program. Long tests run in part.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

packages=()
have aarch64-linux-gnu-g++ || packages+=(g++-aarch64-linux-gnu)
have qemu-aarch64 || packages+=(qemu-user)
apt_install "${packages[@]}"

"$ROOT/scripts/native.sh" aarch64
[ "$(uname -m)" = x86_64 ] || exit 0

programs=(test_dispatch test_known_answers test_golden test_hash test_huffman test_codec test_delta test_gemm_kernels)
programs+=(test_gemm test_gemm_variants test_low_rank_kernels test_rows test_similarity_kernels)
step "configure dev" dev-configure cmake --preset dev
step "compile ${#programs[@]} tests" dev-build cmake --build --preset dev --target "${programs[@]}"

on_cpu() { PYDEDUP_TEST_PERCENT=10 qemu-x86_64 -cpu "$1" "build/dev/tests/native/$2"; }
# refuses CPU KERNEL: the demand for a kernel that the CPU cannot run fails, and says so.
refuses() {
    local said
    said=$(PYDEDUP_KERNEL=$2 on_cpu "$1" test_golden 2>&1) && said="nothing was refused: $said"
    printf '%s\n' "$said"
    grep -q "kernel '$2' cannot run on this machine" <<<"$said"
}
for cpu in Nehalem Haswell; do
    for program in "${programs[@]}"; do
        step "$program on $cpu" "$cpu-$program" on_cpu "$cpu" "$program"
    done
done
step "avx2 on Nehalem is refused" Nehalem-avx2 refuses Nehalem avx2
step "avx512 on Haswell is refused" Haswell-avx512 refuses Haswell avx512
