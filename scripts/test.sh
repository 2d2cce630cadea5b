#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# test.sh: all of the tests, the way that CI runs them.
#
# Installs what they need, then the native tests of the C++ core, style and types, and pytest on
# the installed wheel. A stage that fails does not keep the next from running; the summary and the
# exit status tell of all of them. Arguments go to pytest.
#
# Several pytests run side by side, one more than JOBS, since most tests leave a core idle: one for
# each line of PARTS, and one for all the rest. With a path among the arguments there is one alone.
# What is marked long is left to `make test-long`, unless its path is given.
set -uo pipefail
. "$(dirname "$0")/lib.sh"

"$ROOT/scripts/setup.sh" test || die "setting up failed, so no test was run"

# Servers of Debian's packages that only root has on the PATH.
export PATH="$PATH:/usr/sbin"
# A test that lacks its database server, its browser, or a disk to fill fails here, instead of being
# skipped without notice.
backends=sqlite,postgres,mysql
if have chromium || ! chromium_is_snap; then backends+=,chromium; fi
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

# The longest first, so that all end at about the same time. What a part costs of its own are
# imports and servers, some 4 s of a core.
PARTS=(
    "tests/ray"
    "tests/unit"
    "tests/adapters"
    "tests/e2e/test_[a-l]*.py"
    "tests/e2e/test_[m-z]*.py tests/e2e/lost"
    "tests/crash tests/e2e/repair"
    "tests/moving tests/scoring"
    "tests/serving tests/report"
    "tests/e2e/cli tests/http"
)

declare -A running=()  # the number of the part of each pytest, by its process
clock=""               # what ends after a minute

# Wait for one that is done, and show what it said; each minute, how far all are.
finish_one() {
    local pid number status
    while :; do
        status=0
        sleep 60 &
        clock=$!
        wait -n -p pid "${!running[@]}" "$clock" || status=$?
        [ "$pid" = "$clock" ] || break
        say "    $((SECONDS - python_started)) s: $(far_parts)"
    done
    stop_clock
    number=${running[$pid]}
    unset "running[$pid]"
    say "" "== python: ${PARTS[$number]:-the rest} (after $((SECONDS - python_started)) s: exit status $status)"
    cat "$LOGS/pytest-$number.log"
    # With -k a part may have no test (5), but not all of them.
    case $status in
        0) some_passed=1 ;;
        5) ;;
        *) some_failed=1 ;;
    esac
}

stop_clock() {
    [ -z "$clock" ] || { kill "$clock" && wait "$clock"; } 2>/dev/null
    clock=""
}

# The parts that are running, each with its share of tests that are done.
far_parts() {
    local number share
    for number in $(printf '%s\n' "${running[@]}" | sort -n); do
        share=$(grep -o '[0-9]*%\]$' "$LOGS/pytest-$number.log" | tail -n 1)
        printf '%s %s, ' "${PARTS[$number]:-the rest}" "${share%]}"
    done | sed 's/, $//'
}

interrupt_parts() {
    local pid
    stop_clock
    for pid in "${!running[@]}"; do kill -INT -- "-$pid" 2>/dev/null; done
    wait
}

# Plain `pytest`, since `python -m pytest` would import the sources instead of the wheel.
python_tests() {
    local argument number python_started=$SECONDS some_passed=0 some_failed=0
    local -a paths others=()
    rm -f "$LOGS"/pytest*.log
    for argument; do
        if [ -e "${argument%%::*}" ]; then
            "$VENV/bin/pytest" "$@" 2>&1 | tee "$LOGS/pytest.log"
            return
        fi
    done
    # What failed leaves its files, until as many pytests as there are parts have run after it.
    set -- -o tmp_path_retention_count=$((${#PARTS[@]} + 1)) -m "not long" "$@"
    trap interrupt_parts EXIT
    trap 'exit 130' INT
    for ((number = 0; number <= ${#PARTS[@]}; number++)); do
        [ "${#running[@]}" -le "$JOBS" ] || finish_one
        paths=(${PARTS[$number]:-})  # with the names that a pattern stands for
        others+=("${paths[@]/#/--ignore=}")
        say "--> ${PARTS[$number]:-the rest}"
        # In a process group of its own: what else runs in the background is started with SIGINT
        # ignored, and lives on when that comes before tests/conftest.py is loaded.
        set -m
        "$VENV/bin/pytest" "$@" "${paths[@]:-${others[@]}}" >"$LOGS/pytest-$number.log" 2>&1 </dev/null &
        set +m
        running[$!]=$number
    done
    while [ "${#running[@]}" -gt 0 ]; do finish_one; done
    trap - EXIT INT
    [ "$some_failed" -eq 0 ] && [ "$some_passed" -eq 1 ]
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
for log in "$LOGS"/pytest*.log; do
    [ ! -e "$log" ] || say "  $(grep -E '^=+ .*(passed|failed|error).* =+$' "$log" 2>/dev/null | tail -n 1 | tr -d '=' | sed 's/^ *//')"
done
if [ "$failed" -ne 0 ]; then
    say "FAILED: $failed of ${#summary[@]} stages; logs are in build/logs"
    exit 1
fi
say "All ${#summary[@]} stages passed."
