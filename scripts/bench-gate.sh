#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bench-gate.sh [ARGS...]: count the instructions of the kernels under valgrind and hold them against
# bench/callgrind/baseline.json; ARGS go to bench/callgrind/gate.py (--update, --tolerance).
# CXX=g++-14 chooses the compiler, in a build folder of its own.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

{ have valgrind && [ -e /usr/include/valgrind/callgrind.h ]; } || apt_install valgrind
build=build/dev
# g++ is what lib.sh chooses, and so what `make test` has compiled.
[ "${CXX:-g++}" = g++ ] || build=build/dev-$(basename "$CXX")
step "configure bench" gate-configure cmake --preset dev -B "$build"
step "compile the counted kernels" gate-build cmake --build "$build" --target pydedup_callgrind
exec "$VENV/bin/python" bench/callgrind/gate.py --executable "$build/bench/callgrind/pydedup_callgrind" "$@"
