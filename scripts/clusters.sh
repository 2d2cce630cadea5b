#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# clusters.sh: the tests of MariaDB Galera and Spider (tests/clusters), which `make test` leaves out.
#
# mariadb-server has the scripts that fill a new node of Galera; Debian starts a server of its own
# with it where there is an init system, which the tests do not touch. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

apt_install mariadb-server mariadb-plugin-spider galera-4 rsync
export PATH="$PATH:/usr/sbin" PYDEDUP_CLUSTERS=1 PYDEDUP_REQUIRE_BACKENDS=galera,spider
"$VENV/bin/pytest" --timeout=900 tests/clusters "$@"
