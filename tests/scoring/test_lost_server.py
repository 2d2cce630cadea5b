# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""A server that is killed while rows are scored: told, and gone on with when it is back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import UnavailableError
from pydedup.testing.servers import unused_name

from .conftest import Tables, add, features


def test_a_server_that_is_killed_while_rows_are_scored(own_server: Any) -> None:
    place = own_server.new_place()
    w, x = add(place, "m@1", seed=1), features(3000)
    add(place, "m@2", seed=2)
    tables, into = Tables(place), unused_name().replace("pydedup", "t")
    table = f"{into}_x"
    tables.run(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, f0 FLOAT, f1 FLOAT, f2 FLOAT)")
    rows = [[i + 1, *map(float, row)] for i, row in enumerate(x)]
    tables.run(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", rows)
    query = f"SELECT id, f0, f1, f2 FROM {table}"
    with pydedup.open(place) as store:
        store.alias("m", "prod", "1")

        def kill(stage: str, done: int, total: int) -> None:
            if done == 300:
                own_server.kill()

        try:
            with pytest.raises(UnavailableError):
                store.score(query, "m@prod", into=into, batch=100, progress=kill)
        finally:
            own_server.start()
        store.alias("m", "prod", "2")
        report = store.score(query, "m@prod", into=into, batch=100)
        assert (report.model, report.rows, report.skipped) == ("m@1", 2700, 300)
        assert report.resumed
        assert store._adapter.jobs() == []
    found = dict(tables.run(f"SELECT id, prediction FROM {into}"))
    np.testing.assert_allclose(
        [found[i + 1] for i in range(3000)], (x @ w.T)[:, 0], rtol=1e-4, atol=1e-5
    )
