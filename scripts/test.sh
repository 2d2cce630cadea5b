#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# test.sh: all of the tests, the way that CI runs them.
#
# Installs what they need, then the native tests of the C++ core, style and types, and pytest on
# the installed wheel. A stage that fails does not keep the next from running; the summary and the
# exit status tell of all of them. Arguments go to pytest.
#
# Two pytests run side by side, since most tests leave a core idle: of the folders in FIRST, and of
# all the rest. With a path among the arguments there is one.
set -uo pipefail
. "$(dirname "$0")/lib.sh"

"$ROOT/scripts/setup.sh" test || die "setting up failed, so no test was run"

# Servers of Debian's packages that only root has on the PATH.
export PATH="$PATH:/usr/sbin"
# A test that lacks its database server, its browser, or a disk to fill fails here, instead of being
# skipped without notice.
backends=sqlite,postgres,mysql,chromium
if may_mount; then backends+=,disk; fi
if plpython_is_of "$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"; then
    backends+=,plpython
fi
export PYDEDUP_REQUIRE_BACKENDS=${PYDEDUP_REQUIRE_BACKENDS-$backends}

summary=()
failed=0
stage() {
    local name=$1 started=$SECONDS verdict=passed
    shift
    say "" "== $name"
    "$@" || { verdict=FAILED; failed=$((failed + 1)); }
    summary+=("$(printf '%-14s %-7s %5d s' "$name" "$verdict" $((SECONDS - started)))")
}

native() {
    step "configure the core" native-configure cmake --preset dev &&
        step "compile the core" native-build cmake --build --preset dev &&
        ctest --preset dev | tee "$LOGS/native-test.log"
}

FIRST=(tests/adapters tests/crash tests/e2e/cli tests/e2e/repair tests/http tests/kernels tests/moving tests/property tests/report tests/scoring tests/serving)

# Plain `pytest`, since `python -m pytest` would import the sources instead of the wheel.
python_tests() {
    local argument first first_status=0 rest_status=0
    rm -f "$LOGS/pytest-first.log"
    for argument; do
        if [ -e "${argument%%::*}" ]; then
            "$VENV/bin/pytest" "$@" 2>&1 | tee "$LOGS/pytest.log"
            return
        fi
    done
    # In a process group of its own: what else runs in the background is started with SIGINT ignored,
    # and lives on when that comes before tests/conftest.py is loaded.
    set -m
    "$VENV/bin/pytest" "$@" "${FIRST[@]}" >"$LOGS/pytest-first.log" 2>&1 </dev/null &
    first=$!
    set +m
    trap 'kill -INT -- "-$first" 2>/dev/null; wait "$first"' EXIT
    trap 'exit 130' INT
    "$VENV/bin/pytest" "$@" "${FIRST[@]/#/--ignore=}" 2>&1 | tee "$LOGS/pytest.log" || rest_status=$?
    wait "$first" || first_status=$?
    trap - EXIT INT
    say "" "== python: ${FIRST[*]}"
    cat "$LOGS/pytest-first.log"
    # With -k one of them may have no test (5), but not both.
    case $rest_status,$first_status in
        0,0 | 0,5 | 5,0) ;;
        *) return 1 ;;
    esac
}

# Style and types are looked at while the core compiles, which mostly waits for its largest files.
"$ROOT/scripts/lint.sh" >"$LOGS/lint.log" 2>&1 &
lint=$!
style() {
    local status=0
    wait "$lint" || status=$?
    cat "$LOGS/lint.log"
    return "$status"
}
stage "native" native
stage "style, types" style
stage "python" python_tests "$@"

say "" "== summary (all of it took $((SECONDS / 60)) min $((SECONDS % 60)) s)"
printf '  %s\n' "${summary[@]}"
say "  $(grep -E '^[0-9]+% tests passed' "$LOGS/native-test.log" 2>/dev/null | tail -n 1)"
for log in "$LOGS/pytest.log" "$LOGS/pytest-first.log"; do
    [ ! -e "$log" ] || say "  $(grep -E '^=+ .*(passed|failed|error).* =+$' "$log" 2>/dev/null | tail -n 1 | tr -d '=' | sed 's/^ *//')"
done
if [ "$failed" -ne 0 ]; then
    say "FAILED: $failed of ${#summary[@]} stages; logs are in build/logs"
    exit 1
fi
say "All ${#summary[@]} stages passed."
