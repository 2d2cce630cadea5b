#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bench.sh [--compare OLD.json] [ARGS...]: compile and run the native harness of bench/native; ARGS
# go to it (--help says which). With --compare the results are held against those of an earlier run
# (pydedup_bench --json), and kept in build/dev/last.json.
# Numbers of a busy machine mean little: the harness says what it ran on and how far they spread.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

arguments=()
old=
while [ $# -gt 0 ]; do
    case $1 in
        --compare)
            [ $# -gt 1 ] || die "--compare needs the JSON document of an earlier run"
            [ -r "$2" ] || die "cannot read $2"
            old=$2
            shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

step "configure bench" bench-configure cmake --preset dev >&2
step "compile bench" bench-build cmake --build --preset dev --target pydedup_bench >&2
harness=$ROOT/build/dev/bench/native/pydedup_bench
[ -n "$old" ] || exec "$harness" "${arguments[@]}"
"$harness" --json "${arguments[@]}" >"$ROOT/build/dev/last.json"
exec "${PYTHON:-python3}" bench/compare.py "$old" "$ROOT/build/dev/last.json"
