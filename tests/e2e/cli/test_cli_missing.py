# SPDX-License-Identifier: Apache-2.0
"""What the program says of a store that is not there, and who must do what."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup.cli.app import main
from pydedup.errors import MissingStoreError, NotAStoreError

LOOKING = (("ls",), ("stats",), ("verify",), ("vacuum",), ("rm", "m"), ("quota", "t=a", "5"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    np.savez(tmp_path / "m.npz", w=np.arange(4096, dtype=np.float32))
    return tmp_path / "m.npz"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that must fail, and return what it says in one line."""

    def run(*arguments: object, status: int = 3) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == status
        told = capsys.readouterr()
        assert told.out == ""
        assert len(told.err.splitlines()) == 1
        return told.err

    return run


def test_a_missing_store_is_created_by_add(store_url: str, model: Path, said: Any) -> None:
    for command, *rest in LOOKING:
        told = said(command, store_url, *rest)
        assert "; `pydedup add` creates one" in told
        assert "mode" not in told
    with pytest.raises(MissingStoreError, match="; open it with mode 'a' to create one"):
        pydedup.open(store_url, mode="r")
    assert main(["add", store_url, "m", str(model), "--dry-run", "-q"]) == 0
    said("ls", store_url)
    assert main(["add", store_url, "m", str(model), "-q"]) == 0
    assert main(["ls", store_url]) == 0


def test_folders_that_must_be_there_first(tmp_path: Path, model: Path, said: Any) -> None:
    path = tmp_path / "missing" / "models.db"
    assert f"create the folder {path.parent}, then `pydedup add` creates one" in said("ls", path)
    assert "create the folder" in said("add", path, "m", model, "--dry-run")
    told = said("restore", tmp_path / "none.backup", tmp_path / "new.db")
    assert "there is no such backup" in told
    assert "pydedup add" not in told


def test_what_is_something_else_is_not_missing(tmp_path: Path, said: Any) -> None:
    (tmp_path / "notes.db").write_text("no store " * 100)
    assert "pydedup add" not in said("ls", tmp_path / "notes.db", status=4)
    with pytest.raises(NotAStoreError) as caught:
        pydedup.open(tmp_path / "notes.db", mode="r")
    assert not isinstance(caught.value, MissingStoreError)


def test_a_role_of_postgres_that_may_not_create(
    postgres_user: tuple[str, str], postgres_url: str, postgres_schema: str, model: Path, said: Any
) -> None:
    role, url = postgres_user
    told = said("ls", url)
    assert f"user {role} may not create one: connect as one who may, or let an" in told
    statement = f'CREATE SCHEMA "{postgres_schema}" AUTHORIZATION "{role}"'
    assert f"{statement}, then `pydedup add` creates one" in told
    assert statement in said("add", url, "m", model, status=4)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(statement)
    assert main(["add", url, "m", str(model), "-q"]) == 0


def test_a_user_of_mariadb_who_may_not_create(
    mysql_user: tuple[str, str], mysql_database: str, mysql_run: Any, model: Path, said: Any
) -> None:
    name, url = mysql_user
    database = urlsplit(mysql_database).path.strip("/")
    mysql_run(mysql_database, f"GRANT SELECT ON {database}.* TO {name}")
    told = said("ls", url)
    assert f"user {name}@% may not create one: connect as one who may, or let an" in told
    assert "administrator run GRANT CREATE" in told
    assert "then `pydedup add` creates one" in told
    refused = said("add", url, "m", model, status=4).strip()
    assert "holds no store; user" in refused  # and not which of the statements was refused first
    statement = refused.rpartition(" run ")[2]
    assert statement in told
    mysql_run(mysql_database, statement)
    assert "; `pydedup add` creates one" in said("ls", url)
    assert main(["add", url, "m", str(model), "-q"]) == 0
