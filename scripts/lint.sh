#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# lint.sh [--fix]: style and types of everything that is ours, with the tools of the extra `lint`.
# Runs every check even after one failed, so that one run shows all there is to mend.
# Checks nothing of behaviour; scripts/test.sh does.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

if [ -x "$VENV/bin/python" ] && ! fresh lint "$(digest_of pyproject.toml)"; then
    # The versions that pyproject.toml names, without pydedup and what it needs.
    mapfile -t tools < <("$VENV/bin/python" -c '
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["lint"], sep="\n")')
    step "style tools" lint-tools "$VENV/bin/pip" install "${tools[@]}"
    done_with lint "$(digest_of pyproject.toml)"
fi

mapfile -t cxx < <(find csrc tests/native bench \( -name '*.cpp' -o -name '*.hpp' \) 2>/dev/null | LC_ALL=C sort)
failures=0
check() { step "$@" || failures=$((failures + 1)); }

if [ "${1:-}" = --fix ]; then
    check "ruff: sort and mend" lint-ruff ruff check --fix .
    check "ruff: format" lint-format ruff format .
    check "clang-format: format" lint-clang clang-format -i "${cxx[@]}"
else
    check "ruff: rules" lint-ruff ruff check .
    check "ruff: format" lint-format ruff format --check .
    check "clang-format" lint-clang clang-format --dry-run -Werror "${cxx[@]}"
    check "mypy --strict" lint-mypy mypy --strict pydedup adapters
fi
check "hygiene" lint-hygiene "$VENV/bin/python" scripts/hygiene.py
[ "$failures" -eq 0 ] || die "$failures of the style checks failed; 'make format' mends most of what ruff and clang-format say"
