#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bench.sh [ARGS...]: compile and run the native harness of bench/native; ARGS go to it.
# Numbers of a busy machine mean little: the harness says what it ran on and how far they spread.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

step "configure bench" bench-configure cmake --preset bench
step "compile bench" bench-build cmake --build --preset bench
harness=$(find build/bench/bench/native -maxdepth 1 -type f -perm -u+x -name 'pydedup_bench*' | head -n 1)
[ -n "$harness" ] || die "bench/native built no pydedup_bench"
exec "$harness" "$@"
