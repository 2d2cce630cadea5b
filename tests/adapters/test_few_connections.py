# SPDX-License-Identifier: Apache-2.0
"""Users whom a server gives one connection, or two: all that a store does, by several threads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup.errors import UnavailableError
from pydedup.testing._contract_base import in_thread

#: Enough for several transactions of small pages.
MODEL = {
    f"w{n}": np.random.default_rng(n).standard_normal((512, 512)).astype(np.float32)
    for n in range(10)
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no second connection, and as long as a slow machine takes for the first."""
    monkeypatch.setattr("pydedup.adapters._sessions.FIRST_PAUSES", (0.05,) * 600)
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.2)


@pytest.fixture(params=["postgres", "mysql"])
def limited(request: pytest.FixtureRequest) -> Callable[[int], str]:
    """Return the URL of an empty place, as a user who may have so many connections."""
    name, url = request.getfixturevalue(f"{request.param}_user")

    def limit(connections: int) -> str:
        if request.param == "postgres":
            with psycopg.connect(request.getfixturevalue("postgres_url"), autocommit=True) as admin:
                schema = request.getfixturevalue("postgres_schema")
                admin.execute(f"ALTER ROLE {name} CONNECTION LIMIT {connections}")
                admin.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {name}")
        else:
            run, place = (request.getfixturevalue(f"mysql_{one}") for one in ("run", "database"))
            database = place.partition("?")[0].rpartition("/")[2]
            run(place, f"ALTER USER {name} WITH MAX_USER_CONNECTIONS {connections}")
            run(place, f"GRANT ALL ON {database}.* TO {name}")
        return str(url)

    return limit


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("connections", [1, 2])
def test_all_that_a_store_does_goes_by_one_connection(
    limited: Callable[[int], str], connections: int, tmp_path: Path, caplog: Any
) -> None:
    """An add by several workers failed, and so did a verify of MariaDB."""
    url = limited(connections)
    changed = {**MODEL, "w0": MODEL["w0"] + np.float32(1e-3)}
    with caplog.at_level(logging.WARNING, "pydedup"), pydedup.open(url) as store:
        store.add("m", MODEL, workers=4)
    if url.startswith("postgresql"):  # where several write
        assert "goes on with one connection" in caplog.text
        assert "raise its limit: ALTER ROLE" in caplog.text
    with pydedup.open(url) as store:
        store.add("m", changed, workers=2)
        for name, weights in (("m@1", MODEL), ("m@2", changed)):
            loaded = store.load(name)
            assert all((loaded[key] == weights[key]).all() for key in weights)
    with pydedup.open(url, memory="8MiB") as store:
        x = np.ones((1, 512), np.float32)
        for key, weights in MODEL.items():
            y = store.tensor("m@1", key).matmul(x)
            np.testing.assert_allclose(y, x @ weights.T, rtol=1e-3, atol=1e-3)
        assert store.verify().ok
        assert store.stats().versions == 2
        store.backup(tmp_path / "m.backup")
        store.remove("m@1")
        store.vacuum()
        assert store.verify().ok


def test_who_comes_right_after_another_waits_for_that_to_be_gone(
    limited: Callable[[int], str],
) -> None:
    """Of two commands in a row the second was refused, while the server had not noticed."""
    url = limited(1)
    first = pydedup.open(url)
    leaves = threading.Timer(0.3, first.close)
    leaves.start()
    pydedup.open(url).close()
    leaves.join()


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("connections", [1, 2])
def test_threads_that_only_read_take_turns(
    limited: Callable[[int], str], connections: int, caplog: Any
) -> None:
    """As those of a server do. All but the first were refused."""
    url = limited(connections)
    with pydedup.open(url) as store:
        store.add("m", MODEL)
    barrier = threading.Barrier(6)

    def read(store: pydedup.Store) -> None:
        barrier.wait(60)
        for number in range(5):
            assert [info.version for info in store.models()] == ["1"]
            assert store.stats().versions == 1  # a snapshot
            key = f"w{number}"
            x = np.ones((1, 512), np.float32)
            y = store.tensor("m", key).matmul(x)
            np.testing.assert_allclose(y, x @ MODEL[key].T, rtol=1e-3, atol=1e-3)

    with (
        caplog.at_level(logging.WARNING, "pydedup"),
        pydedup.open(url, mode="r", memory="8MiB") as store,
        ThreadPoolExecutor(6) as pool,
    ):
        for one in [pool.submit(read, store) for _ in range(6)]:
            one.result()
    (told,) = [record.getMessage() for record in caplog.records if "take turns" in record.message]
    assert "raise" in told


def test_a_second_thread_is_told_which_limit(limited: Callable[[int], str]) -> None:
    url = limited(1)
    with pydedup.open(url) as store:
        with pytest.raises(UnavailableError, match="raise"):
            in_thread(store.models)
        assert store.models() == []
