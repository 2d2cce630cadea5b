#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# setup.sh [EXTRA]: from a bare Debian to an environment with pydedup in it.
#
# Installs what is missing of the system (compiler, Python headers, for `test` a database server),
# makes the virtual environment, builds a wheel and installs it with EXTRA (demo, test, bench).
# Without EXTRA it stops at the tools. What has not changed is not done again: the stamps in
# .venv/.stamps hold digests of what each step was made from.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
EXTRA=${1:-}

# -- Python ---------------------------------------------------------------------------------------
is_usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# 3.11 first: newer ones work as well, but the largest dependency (torch) is best supplied for it.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_usable "$PYTHON" || die "PYTHON=$PYTHON is not a Python of at least 3.11"
        command -v "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
        if have "$candidate" && is_usable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

# The search must not find the interpreter of the environment that it is for.
SYSTEM_PATH=${PATH#"$VENV/bin:"}
BASE_PYTHON=$(PATH=$SYSTEM_PATH find_python)
if [ -z "$BASE_PYTHON" ]; then
    apt_install python3
    BASE_PYTHON=$(PATH=$SYSTEM_PATH find_python)
    [ -n "$BASE_PYTHON" ] || die "no Python of at least 3.11 here; install one and set PYTHON=/path/to/it"
fi
# What `python3` really is: a venv's, pyenv's or Debian's, with its minor version.
read -r PY_MINOR PY_REAL < <("$BASE_PYTHON" -c \
    'import sys, os; print("%d.%d" % sys.version_info[:2], os.path.realpath(sys.executable))')

# -- System packages ------------------------------------------------------------------------------
compiles() {
    local dir status=0
    dir=$(mktemp -d)
    printf '#include <concepts>\n#include <span>\nint main() { return std::span<int>{}.size() == 0 ? 0 : 1; }\n' >"$dir/a.cpp"
    "${CXX:-c++}" -std=c++20 "$dir/a.cpp" -o "$dir/a" >/dev/null 2>&1 || status=1
    [ "$status" -ne 0 ] || "${CC:-cc}" --version >/dev/null 2>&1 || status=1
    rm -rf "$dir"
    return "$status"
}
has_headers() { "$PY_REAL" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'; }
makes_venvs() { "$PY_REAL" -c 'import ensurepip, venv' >/dev/null 2>&1; }
has_mariadb() { PATH=$PATH:/usr/sbin have mariadbd && have mariadb-install-db; }

packages=()
compiles || packages+=(g++)
case $PY_REAL in
    /usr/bin/*)
        has_headers || packages+=("python$PY_MINOR-dev")
        makes_venvs || packages+=("python$PY_MINOR-venv") ;;
    *)
        has_headers || die "$PY_REAL has no Python.h; install its headers, or choose another with PYTHON=..."
        makes_venvs || die "$PY_REAL cannot make virtual environments; choose another with PYTHON=..." ;;
esac
if [ "$EXTRA" = test ] && ! have ccache; then packages+=(ccache); fi
# The -core packages are the programs alone: no service is started, no account made.
if [ "$EXTRA" = test ] && ! has_mariadb; then packages+=(mariadb-server-core mariadb-client-core); fi
# Tests run the commands of docs/moving.md. The package has programs alone, too.
if [ "$EXTRA" = test ] && ! have mariadb-dump; then packages+=(mariadb-client); fi
# Of `pydedup report` the tests look at what a browser makes.
if [ "$EXTRA" = test ] && ! have chromium && ! chromium_is_snap; then packages+=(chromium); fi
if [ "$EXTRA" = test ] && ! have openssl; then packages+=(openssl); fi  # for servers with TLS
# PL/Python, where it is of the Python that pydedup is built for; else `make test-plpython` is for it.
if [ "$EXTRA" = test ] && plpython_is_of "$PY_MINOR" && ! has_plpython; then
    no_cluster
    packages+=("postgresql-plpython3-$(plpython_version)")
fi
apt_install "${packages[@]}"
with_ccache
compiles || die "${CXX:-c++} cannot compile C++20; GCC 11 or Clang 14 is the least (choose with CC= and CXX=)"

# -- The environment ------------------------------------------------------------------------------
if ! fresh python "$PY_REAL" || ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
    [ ! -e "$VENV" ] || [ -e "$VENV/pyvenv.cfg" ] || die "$VENV exists and is no virtual environment; move it away"
    step "virtual environment ${VENV#"$ROOT"/} (Python $PY_MINOR)" venv "$PY_REAL" -m venv --clear "$VENV"
    done_with python "$PY_REAL"
fi

# cmake and ninja come from PyPI, so that every machine builds with the same; the rest is what
# pyproject.toml asks a build to have.
TOOLS_KEY=$(digest_of pyproject.toml)
if ! fresh tools "$TOOLS_KEY"; then
    mapfile -t build_requires < <("$VENV/bin/python" -c '
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")')
    step "build tools" tools "$VENV/bin/pip" install "${build_requires[@]}" "cmake>=3.25" "ninja>=1.11"
    done_with tools "$TOOLS_KEY"
fi
[ -n "$EXTRA" ] || exit 0

# -- Build and install ----------------------------------------------------------------------------
DEPENDENCIES_KEY="$TOOLS_KEY $PY_REAL"

# What pydedup needs is fetched and unpacked while pydedup compiles. The step below that installs it
# with the extra waits for that, and says what is wrong, since it has to do it all then.
ahead=
if ! fresh "extra-$EXTRA" "$DEPENDENCIES_KEY"; then
    mapfile -t requirements < <("$VENV/bin/python" - "$EXTRA" <<'PYTHON'
import re, sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]


def of_extra(name):
    for requirement in project["optional-dependencies"][name]:
        ours = re.fullmatch(r"pydedup\[(.*)\]", requirement)
        if ours:
            for inner in ours[1].split(","):
                yield from of_extra(inner.strip())
        else:
            yield requirement


print(*project["dependencies"], *of_extra(sys.argv[1]), sep="\n")
PYTHON
    )
    set -m  # a process group of its own, to be ended with all that it has started
    "$VENV/bin/pip" install --no-compile "${requirements[@]}" >"$LOGS/ahead.log" 2>&1 </dev/null &
    ahead=$!
    set +m
    trap 'kill -TERM -- "-$ahead" 2>/dev/null' EXIT
fi
install_extra() {
    tail -n 1 -f --pid="$ahead" "$LOGS/ahead.log"
    "$VENV/bin/pip" install --no-compile "${WHEEL}[$EXTRA]" || return
    # pip takes a minute for the 20,000 files, on one core. All but two fifths, which are tests of
    # those packages and large parts that few import: what Python compiles when it is imported may
    # warn, which is an error in tests. Some packages have files of other Pythons.
    local others='.*/tests?|ray/(llm|rllib|train|tune)|transformers/models/[b-z][^/]*|torch/(_inductor|testing)'
    others="$others|networkx/algorithms|sympy/physics"
    "$VENV/bin/python" -m compileall -qq -j "$JOBS" -x "site-packages/($others)/" \
        "$VENV/lib/python$PY_MINOR/site-packages" || :
}

# A wheel, and not an editable install: what runs is what would be shipped. Without isolation, so
# that CMake's build folder stays valid and a second build compiles only what changed.
WHEELS=$ROOT/build/wheels
SOURCES_KEY=$(digest_of pyproject.toml CMakeLists.txt LICENSE README.md csrc pydedup adapters)
SOURCES_KEY="$SOURCES_KEY $PY_REAL ${CC:-} ${CXX:-} ${CFLAGS:-} ${CXXFLAGS:-} ${CMAKE_ARGS:-}"
if ! fresh wheel "$SOURCES_KEY" || ! compgen -G "$WHEELS/pydedup-*.whl" >/dev/null; then
    rm -rf "$WHEELS"
    step "compile pydedup" compile "$VENV/bin/pip" wheel -v --no-build-isolation --no-deps --wheel-dir "$WHEELS" .
    done_with wheel "$SOURCES_KEY"
fi
WHEEL=$(compgen -G "$WHEELS/pydedup-*.whl")

if [ -n "$ahead" ]; then
    step "install with the extra '$EXTRA'" "extra-$EXTRA" install_extra
    trap - EXIT
    done_with "extra-$EXTRA" "$DEPENDENCIES_KEY"
    rm -f "$STAMPS/installed"
fi
if ! fresh installed "$SOURCES_KEY"; then
    step "install pydedup" install "$VENV/bin/pip" install --force-reinstall --no-deps "$WHEEL"
    done_with installed "$SOURCES_KEY"
fi
