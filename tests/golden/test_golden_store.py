# SPDX-License-Identifier: Apache-2.0
"""What an earlier version stored, this one reads: whole stores, written once and kept.

Each is a file of SQLite, and what pg_dump, mariadb-dump and mysqldump made of the same in a server.
A new version of the tables adds one of each; the tests then show that it is migrated.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import pydedup

FOLDER = Path(__file__).parent


def _maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_store_golden", FOLDER / "make_store_golden.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VERSIONS = ["store_v1"]


def content(file: str) -> bytes:
    return gzip.decompress((FOLDER / file).read_bytes())


@pytest.mark.parametrize("name", VERSIONS)
def test_a_golden_file_is_read_and_written_on(name: str, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(content(f"{name}.db.gz"))
    assert_is_read_and_written_on(str(path))


def test_a_golden_file_with_stacks_of_matrices(tmp_path: Path) -> None:
    """Those of before are cut as one matrix, each of whose rows is one of theirs."""
    path = tmp_path / "store.db"
    path.write_bytes(content("store_v1_stacks.db.gz"))
    wanted = _maker().stacks()
    with pydedup.open(path) as store:
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
        for address, model in wanted.items():
            assert store.load(address)["experts"].tobytes() == model["experts"].tobytes()
            cut = store.tensor(address, "experts")
            assert (cut.is_stack, cut.block_shape) == (
                (False, (3, 1344)) if address == "flat@1" else (True, (64, 64))
            )
            assert np.array_equal(cut.take([2, 0]), model["experts"][[2, 0]])
        assert store.add("again", wanted["m@1"]).stored_bytes == 0
        assert store.info("again").info.digest == store.info("m").info.digest


def test_a_golden_file_with_large_artifacts(tmp_path: Path) -> None:
    """Which are in blocks; that of ``few`` is one chunk."""
    path = tmp_path / "store.db"
    path.write_bytes(content("store_v1_artifacts.db.gz"))
    with pydedup.open(path) as store:
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
        for address, wanted in _maker().tokenizers().items():
            assert store.artifacts(address) == {"tokenizer.json": wanted}
            store.export(address, tmp_path / address)
        again = store.add("again", tmp_path / "one@1")
        assert again.stored_artifact_bytes < 1_000 < again.artifact_bytes


@pytest.mark.parametrize("name", VERSIONS)
def test_a_golden_dump_of_postgres(name: str, postgres_url: str, postgres_schema: str) -> None:
    import psycopg

    dump = content(f"{name}.postgres.sql.gz").replace(b"pydedup_golden", postgres_schema.encode())
    with psycopg.connect(postgres_url) as connection:
        connection.execute(dump)
    separator = "&" if "?" in postgres_url else "?"
    assert_is_read_and_written_on(f"{postgres_url}{separator}schema={postgres_schema}")


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("kind", ["mysql", "mysql8"])
def test_a_golden_dump_of_mysql(
    name: str, kind: str, of_mysql: bool, mysql_database: str, mysql_run: Callable[..., object]
) -> None:
    """That of MariaDB is loaded there alone, that of MySQL 8.0 by newer ones and MariaDB, too."""
    if of_mysql and kind == "mysql":
        pytest.skip("MySQL refuses what mariadb-dump writes")
    # No value has such a line end: bytes are in hexadecimal, and texts are JSON.
    statements = content(f"{name}.{kind}.sql.gz").decode().split(";\n")
    mysql_run(mysql_database, *(statement for statement in statements if statement.strip()))
    assert_is_read_and_written_on(mysql_database)


def assert_is_read_and_written_on(url: str) -> None:
    wanted = _maker().models()
    pydedup.open(url).close()  # which migrates one of an older version
    with pydedup.open(url, mode="r") as store:
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
        assert {info.address for info in store.models()} == set(wanted)
        for address, model in wanted.items():
            loaded = store.load(address)
            assert list(loaded) == list(model)
            for name, array in model.items():
                assert loaded[name].dtype == array.dtype
                assert loaded[name].shape == array.shape
                assert loaded[name].tobytes() == array.tobytes()
        assert store.info("base@prod").info.metadata == {"task": "golden"}
        assert store.info("tuned").certificate["policy"] == "exact"
        ids = np.array([[1, 5, 299], [0, 0, 7]])
        model = wanted["tuned@1"]
        logits = model["embedding"][ids].mean(axis=1) @ model["head.weight"].T
        np.testing.assert_allclose(store.predict("tuned", ids), logits, rtol=1e-5, atol=1e-6)
        before = {info.address: info.digest for info in store.models()}
    with pydedup.open(url) as store:
        again = store.add("again", wanted["base@1"])
        assert again.stored_bytes == 0, "digests of this version are those of the golden one"
        store.remove("tuned")
        store.vacuum()
        assert store.verify().errors == []
        assert store.info("base").info.digest == before["base@1"] == store.info("again").info.digest
