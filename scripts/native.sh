#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# native.sh PRESET...: configure, compile and test the C++ core with presets of CMakePresets.json.
# A preset without tests (tidy) is only compiled. Needs nothing of Python but cmake and ninja.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
[ $# -gt 0 ] || die "which preset? dev, asan-ubsan, tsan, tidy, aarch64"

for preset in "$@"; do
    runner=()
    tests=("$preset")
    case $preset in
        # TSan's shadow memory does not fit every random address layout that new kernels choose.
        tsan) have setarch && runner=(setarch "$(uname -m)" -R) ;;
        aarch64) tests=(aarch64-scalar aarch64-neon) ;;
        # Its checks are read from .clang-tidy when a file is compiled, so that all are again.
        tidy)
            have clang-tidy || step "clang-tidy" tidy-install "$VENV/bin/pip" install "$(sed -n 's/.*"\(clang-tidy[^"]*\)".*/\1/p' pyproject.toml)"
            rm -rf build/tidy ;;
    esac
    step "configure $preset" "$preset-configure" cmake --preset "$preset"
    if [ "$preset" = tidy ]; then
        # -k 0: every file, also after one had something to mend.
        step "clang-tidy" tidy-build cmake --build --preset tidy -- -k 0
    else
        step "compile $preset" "$preset-build" cmake --build --preset "$preset"
        for test in "${tests[@]}"; do
            say "" "== tests of $test"
            "${runner[@]}" ctest --preset "$test" | tee "$LOGS/$test-test.log"
        done
    fi
done
