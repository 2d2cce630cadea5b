#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# plpython.sh: the tests of functions inside of a PostgreSQL server (tests/scoring/test_plpython.py).
#
# PL/Python of Debian is of Debian's own Python, whatever Python pydedup is developed with. So pydedup
# is built for that one, and installed with what it needs into build/plpython/site, which a private
# server then reads. `make test` runs the same tests where both are one Python. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

number=$(plpython_version)
[ -n "$number" ] || die "only the packages of Debian 12 and 13 are known here; see docs/scoring.md for others"
has_plpython || { no_cluster; apt_install "postgresql-plpython3-$number" python3-venv python3-dev; }

# Of tools and compilers all is as in setup.sh; the environment is one for building alone.
OURS=$VENV
BUILDER=$ROOT/build/plpython/venv
SITE=$ROOT/build/plpython/site
PYTHON=/usr/bin/python3 VENV=$BUILDER "$ROOT/scripts/setup.sh"
STAMPS=$BUILDER/.stamps
KEY=$(digest_of pyproject.toml CMakeLists.txt LICENSE README.md csrc pydedup adapters)
if ! fresh site "$KEY"; then
    rm -rf "$ROOT/build/plpython/wheel" "$SITE"
    step "compile pydedup for Debian's Python" plpython-compile \
        "$BUILDER/bin/pip" wheel --no-build-isolation --no-deps --wheel-dir "$ROOT/build/plpython/wheel" .
    step "install it for the server" plpython-install \
        "$BUILDER/bin/pip" install --target "$SITE" "$ROOT"/build/plpython/wheel/pydedup-*.whl
    done_with site "$KEY"
fi
export PYDEDUP_PLPYTHON_PATH=$SITE PYDEDUP_REQUIRE_BACKENDS=plpython
exec "$OURS/bin/pytest" tests/scoring/test_plpython.py "$@"
