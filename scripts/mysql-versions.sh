#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# mysql-versions.sh [ARGS...]: the tests of MySQL against real servers of it, which `make test` leaves
# out: Debian's stable releases have MariaDB alone. ARGS go to pytest.
#
# Their programs, and the libraries that these want, are packages of the distributions that have them,
# unpacked once into build/mysql and never installed: each is run by its own dynamic linker. The
# tests start servers of them in MariaDB's place (PYDEDUP_TEST_MYSQL_PROGRAMS).
set -euo pipefail
. "$(dirname "$0")/lib.sh"

UBUNTU=http://archive.ubuntu.com/ubuntu
DEBIAN=http://deb.debian.org/debian
# NAME MIRROR KEYRING PACKAGE,PACKAGE SUITE...: MySQL 8.0 is of Ubuntu 24.04, 8.4 of 26.04, the newest of Debian.
RELEASES=(
    "8.0 $UBUNTU ubuntu mysql-server-core-8.0,mysql-client-core-8.0 noble noble-updates"
    "8.4 $UBUNTU ubuntu mysql-server-core,mysql-client-core resolute resolute-updates"
    "newest $DEBIAN debian mysql-server-core,mysql-client-core sid"
)
TESTS=(tests/adapters tests/crash tests/scoring tests/moving tests/golden tests/e2e)

[ "$(uname -m)" = x86_64 ] || die "no programs of MySQL are known for $(uname -m)"
[ -e /usr/share/keyrings/ubuntu-archive-keyring.gpg ] || apt_install ubuntu-archive-keyring

# fetch NAME MIRROR KEYRING PACKAGE,PACKAGE SUITE...: unpack packages and what they need into build/mysql/NAME.part.
fetch() {
    local folder=$ROOT/build/mysql/$1.part mirror=$2 packages suite deb
    local key=/usr/share/keyrings/$3-archive-keyring.gpg apt=$folder/apt
    IFS=, read -ra packages <<<"$4"
    shift 4
    rm -rf "$folder"
    mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial"
    : >"$apt/status"
    for suite in "$@"; do echo "deb [arch=amd64 signed-by=$key] $mirror $suite main"; done >"$apt/sources.list"
    local options=(-q -y -o "Dir::State=$apt/state" -o "Dir::State::status=$apt/status" -o "Dir::Cache=$apt/cache"
        -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=- -o APT::Architecture=amd64
        -o APT::Sandbox::User=)
    apt-get "${options[@]}" update
    apt-get "${options[@]}" --download-only --no-install-recommends install "${packages[@]}"
    for deb in "$apt"/cache/archives/*.deb; do dpkg -x "$deb" "$folder"; done
    rm -rf "$apt"
}

# programs FOLDER: have those in FOLDER/run run what was unpacked there, with its own libraries.
programs() {
    local library=$1/usr/lib/x86_64-linux-gnu share=$1/usr/share/mysql linker program
    linker=$(find "$1" -name ld-linux-x86-64.so.2 | head -n 1)
    local start="exec '$linker' --library-path '$library:$1/lib/x86_64-linux-gnu:$1/usr/lib/mysql/private'"
    mkdir -p "$1/run"
    # Options come last: --no-defaults has to be the first. The system's files may be another server's.
    printf '#!/bin/sh\n%s %s "$@" %s\n' "$start" "'$1/usr/sbin/mysqld'" \
        "--lc-messages-dir='$share' --character-sets-dir='$share/charsets' --plugin-dir='$1/usr/lib/mysql/plugin'" \
        >"$1/run/mysqld"
    for program in mysql mysqldump; do
        printf '#!/bin/sh\n%s %s "$@"\n' "$start" "'$1/usr/bin/$program'" >"$1/run/$program"
    done
    chmod +x "$1/run"/*
}

failed=()
for release in "${RELEASES[@]}"; do
    name=${release%% *}
    folder=$ROOT/build/mysql/$name
    if [ ! -d "$folder" ]; then
        # shellcheck disable=SC2086  # its words are the arguments
        step "MySQL $name" "mysql-$name" fetch $release
        mv "$folder.part" "$folder"
    fi
    programs "$folder"
    say "" "== $("$folder/run/mysqld" --no-defaults --version | sed 's/.* Ver /MySQL /')"
    PYDEDUP_REQUIRE_BACKENDS=mysql PYDEDUP_TEST_MYSQL_PROGRAMS=$folder/run \
        "$VENV/bin/pytest" -q -k "mysql or mariadb" "${TESTS[@]}" "$@" 2>&1 | tee "$LOGS/mysql-$name-test.log" | tail -n 15 || failed+=("$name")
done
[ "${#failed[@]}" -eq 0 ] || die "failed with: ${failed[*]}"
