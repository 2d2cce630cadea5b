# SPDX-License-Identifier: Apache-2.0
"""The documentation names tests that exist, on the back ends that it names them for."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Column of docs/faults.md -> what the name of a test's file may not have in it.
COLUMNS = {"SQLite": ("postgres", "mysql"), "PostgreSQL": ("mysql",), "MariaDB": ("postgres",)}


def files_of_tests() -> dict[str, set[str]]:
    """Return the files that each test is in, from the repository's root."""
    found: dict[str, set[str]] = {}
    for folder in ("tests", "pydedup/testing"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(encoding="utf-8"), re.M):
                found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_faults_name_tests_that_exist() -> None:
    tests = files_of_tests()
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    table = text[text.index("## What is tested where") :]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    header, rows = [cell.strip() for cell in rows[0]], rows[2:]
    assert header[1:] == list(COLUMNS)
    assert len(rows) > 15
    for fault, *cells in rows:
        for column, cell in zip(header[1:], cells, strict=True):
            names = re.findall(r"`(test_\w+)`", cell)
            assert names or cell.strip() == "-", f"{fault} on {column}: {cell}"
            for name in names:
                files = tests.get(name, set())
                fitting = [file for file in files if not any(w in file for w in COLUMNS[column])]
                assert fitting, f"{fault} on {column}: {name} is in {files or 'no file'}"
