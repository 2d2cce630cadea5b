#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# fuzz.sh [TARGET...]: search for inputs that break what reads stored bytes (csrc/fuzz), all targets
# or those named (page, block, delta, kernels, similarity). FUZZ_SECONDS (600) for each, one after
# another, with sanitizers. The corpus grows in build/fuzz-corpus; findings are kept in
# build/fuzz-findings and belong, once mended, into csrc/fuzz/regressions/fuzz_<target>/, which the
# native tests replay.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

seconds=${FUZZ_SECONDS:-600}
[[ $seconds =~ ^[1-9][0-9]*$ ]] || die "FUZZ_SECONDS=$seconds is not a number of seconds"
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    for source in csrc/fuzz/fuzz_*.cpp; do
        name=${source##*/fuzz_}
        targets+=("${name%.cpp}")
    done
fi
for target in "${targets[@]}"; do
    [ -e "csrc/fuzz/fuzz_$target.cpp" ] || die "no fuzz target '$target'; there is: $(ls csrc/fuzz | sed -n 's/^fuzz_\(.*\)\.cpp$/\1/p' | tr '\n' ' ')"
done

# Before 16, clang cannot compile the ranges of libstdc++.
modern_clang() {
    local candidate
    for candidate in clang++ $(compgen -c clang++- | sort -Vr); do
        have "$candidate" && [ "$(printf '__clang_major__' | "$candidate" -E -P -x c - 2>/dev/null)" -ge 16 ] 2>/dev/null &&
            printf 'int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' |
            "$candidate" -x c - -fsanitize=fuzzer,address -o /dev/null >/dev/null 2>&1 &&
            { printf '%s\n' "$candidate"; return; }
    done
    return 1
}
# What Debian calls clang may be older than one that it has beside it.
newest_clang() { apt-cache search --names-only '^libclang-rt-[0-9]+-dev$' | sed -n 's/^libclang-rt-\([0-9]*\)-dev .*/\1/p' | sort -n | tail -n 1; }
compiler=$(modern_clang) || {
    apt_install clang libclang-rt-dev
    modern_clang >/dev/null || { n=$(newest_clang); [ -z "$n" ] || apt_install "clang-$n" "libclang-rt-$n-dev"; }
    compiler=$(modern_clang) || die "a clang of at least 16 with libFuzzer is needed"
}
step "configure fuzz" fuzz-configure cmake --preset fuzz \
    -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_C_COMPILER="${compiler/clang++/clang}"
for target in "${targets[@]}"; do
    step "compile fuzz_$target" fuzz-build cmake --build --preset fuzz --target "fuzz_$target" "replay_fuzz_$target"
done
failed=()
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
for target in "${targets[@]}"; do
    program=build/fuzz/csrc/fuzz/fuzz_$target
    corpus=build/fuzz-corpus/$target
    findings=build/fuzz-findings/$target
    mkdir -p "$corpus" "$findings"
    build/fuzz/csrc/fuzz/replay_fuzz_"$target" --write "$corpus"
    # What a parser may ask for is bounded: more than 2 GB at once is a finding.
    step "fuzz_$target for $seconds s" "fuzz-$target" "$program" -max_total_time="$seconds" \
        -timeout=20 -malloc_limit_mb=2048 -rss_limit_mb=3072 -max_len=65536 -print_final_stats=1 \
        -artifact_prefix="$findings/" "$corpus" || failed+=("$target")
done
[ ${#failed[@]} -eq 0 ] || die "findings in build/fuzz-findings of: ${failed[*]} (logs in build/logs)"
say "No finding in $seconds s for each of: ${targets[*]}"
