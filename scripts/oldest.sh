#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# oldest.sh [ARGS...]: the tests with the oldest releases that pyproject.toml takes of all that it
# names, but for Ray's (its own tests say which of its releases fit). ARGS go to pytest.
#
# uv chooses the releases, which pip cannot: into build/oldest, an environment of its own. Only the
# wheel is the one of `make test`.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

WHEEL=$(compgen -G "$ROOT/build/wheels/pydedup-*.whl") || die "there is no wheel; run make setup first"
OLDEST=$ROOT/build/oldest
OURS=$VENV
STAMPS=$OLDEST/.stamps
KEY="$(digest_of pyproject.toml) $(readlink -f "$OURS/bin/python")"
if ! fresh packages "$KEY"; then
    step "virtual environment ${OLDEST#"$ROOT"/}" oldest-venv "$OURS/bin/python" -m venv --clear "$OLDEST"
    step "uv" oldest-uv "$OLDEST/bin/pip" install uv
    step "the oldest releases" oldest-packages "$OLDEST/bin/uv" pip install --python "$OLDEST/bin/python" \
        --resolution lowest-direct -r pyproject.toml --extra test
    done_with packages "$KEY"
fi
step "install pydedup" oldest-install "$OLDEST/bin/pip" install --force-reinstall --no-deps "$WHEEL"
export PATH="$PATH:/usr/sbin" PYDEDUP_REQUIRE_BACKENDS=${PYDEDUP_REQUIRE_BACKENDS-sqlite,postgres,mysql}
exec "$OLDEST/bin/pytest" tests --ignore tests/ray --ignore tests/native "$@"
