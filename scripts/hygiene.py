#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check what no formatter checks, in every text file that git knows.

Trailing blanks, missing or doubled final newlines, carriage returns, merge markers, tabs outside
of Makefiles, files of more than 1 MiB, a missing licence line, broken TOML or JSON. Not here:
anything that ruff, mypy or clang-format says already. Standard library only: it runs before
anything is installed, and as a pre-commit hook with file names as its arguments.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 1 << 20
NEEDS_SPDX = {".py", ".pyi", ".pyx", ".pxd", ".cpp", ".hpp", ".sh", ".cmake"}
TABS_ALLOWED = {"Makefile"}
# What is not ours to reformat: files that tests read byte for byte, and the licence.
VERBATIM = ("tests/golden/", "tests/data/", "LICENSE")
MERGE_MARKER = re.compile(rb"^(<{7} |={7}$|>{7} )", re.MULTILINE)


def tracked_files() -> list[Path]:
    """Return the files that git tracks or would track; without git, all but generated folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        generated = {"build", "dist", "wheelhouse"}
        return [
            path
            for path in ROOT.rglob("*")
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(ROOT).parts[:-1])
            and not generated & set(path.relative_to(ROOT).parts)
        ]
    return [ROOT / name for name in listed.decode().split("\0") if name]


def problems(path: Path) -> Iterator[str]:
    """Yield what is wrong with one file."""
    data = path.read_bytes()
    if len(data) > MAX_BYTES:
        yield f"has {len(data)} bytes; more than {MAX_BYTES} do not belong into the repository"
    if b"\0" in data[:8192] or path.relative_to(ROOT).as_posix().startswith(VERBATIM):
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.endswith(b"\r"):
            yield f"line {number} ends with a carriage return"
        elif line != line.rstrip():
            yield f"line {number} has trailing blanks"
        if b"\t" in line and path.name not in TABS_ALLOWED:
            yield f"line {number} has a tab"
    if data and not data.endswith(b"\n"):
        yield "does not end with a newline"
    if data.endswith(b"\n\n"):
        yield "ends with empty lines"
    if MERGE_MARKER.search(data):
        yield "has a merge marker"
    if path.suffix in NEEDS_SPDX and data.strip() and b"SPDX-License-Identifier" not in data[:300]:
        yield "has no SPDX-License-Identifier line at its top"
    try:
        if path.suffix == ".json":
            json.loads(data)
        elif path.suffix == ".toml":
            tomllib.loads(data.decode())
    except ValueError as error:
        yield f"does not parse: {error}"


def main(arguments: list[str]) -> int:
    """Check the named files, or all of them, and return the exit status."""
    paths = [Path(name).resolve() for name in arguments] or tracked_files()
    found = 0
    for path in sorted(paths):
        if not path.is_file() or path.is_symlink():
            continue
        for problem in problems(path):
            found += 1
            print(f"{path.relative_to(ROOT)}: {problem}")
    print(f"{len(paths)} files checked, {found} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
