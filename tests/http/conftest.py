# SPDX-License-Identifier: Apache-2.0
"""A store of small models, and real servers on it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup.graph import Graph, Node
from pydedup.testing._contract_base import with_option
from pydedup.testing.serving import Answer, Busy, Server, Start, serving, until

DIM, CLASSES, WORDS = 4, 3, 50


def dense(seed: int = 0) -> tuple[dict[str, Any], Graph]:
    """A linear layer and its softmax."""
    rng = np.random.default_rng(seed)
    tensors = {
        "w": rng.standard_normal((CLASSES, DIM), np.float32),
        "b": rng.standard_normal(CLASSES, np.float32),
    }
    nodes = (
        Node("linear", ("x",), "h", {"weight": "w", "bias": "b"}),
        Node("softmax", ("h",), "y"),
    )
    return tensors, Graph(("x",), ("y",), nodes)


def words() -> tuple[dict[str, Any], Graph]:
    """Rows of a table, their mean, and the table's row numbers themselves as an output."""
    table = np.random.default_rng(1).standard_normal((WORDS, DIM), np.float32)
    nodes = (
        Node("embedding", ("ids",), "rows", {"weight": "table"}),
        Node("mean", ("rows",), "mean", attrs={"axis": 1}),
        Node("identity", ("ids",), "same"),
    )
    return {"table": table}, Graph(("ids",), ("mean", "same"), nodes)


def bags() -> tuple[dict[str, Any], Graph]:
    """Bags with offsets, which cannot be joined."""
    table = np.random.default_rng(2).standard_normal((WORDS, DIM), np.float32)
    nodes = (Node("embedding_bag", ("ids", "offsets"), "y", {"weight": "table"}),)
    return {"table": table}, Graph(("ids", "offsets"), ("y",), nodes)


def slow(layers: int = 200) -> tuple[dict[str, Any], Graph]:
    """One matrix, many times: about a second for 500 rows."""
    # Orthogonal, so that roundings stay as small as they are.
    weight, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((512, 512)))
    names = ["x", *(f"h{i}" for i in range(layers))]
    nodes = tuple(Node("linear", (a,), b, {"weight": "w"}) for a, b in itertools.pairwise(names))
    return {"w": weight.astype(np.float32)}, Graph(("x",), (names[-1],), nodes)


def fill(url: str) -> None:
    """Make the store that the tests serve."""
    with pydedup.open(url) as store:
        for version in ("1", "2"):
            tensors, graph = dense(int(version))
            store.add(f"dense@{version}", tensors, graph=graph)
        store.alias("dense", "prod", "1")
        for name, make in {"words": words, "bags": bags, "slow": slow}.items():
            tensors, graph = make()
            store.add(f"{name}@1", tensors, graph=graph)
        tensors, graph = dense(7)
        store.add("équipe/ranking model@2026-11", tensors, graph=graph)
        store.add("plain@1", {"w": np.ones((3, 3), np.float32)})


@pytest.fixture(scope="session")
def store_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that no test changes."""
    url = f"sqlite:///{tmp_path_factory.mktemp('http') / 'models.db'}"
    fill(url)
    return url


@pytest.fixture(scope="session")
def server(store_url: str) -> Iterator[Server]:
    """A server on it, as it is started without options."""
    with serving(store_url) as found:
        yield found


@pytest.fixture
def start() -> Iterator[Start]:
    """Start servers that are stopped at the end of the test."""
    with contextlib.ExitStack() as running:
        yield lambda *given, **options: running.enter_context(serving(*given, **options))


@pytest.fixture
def own_url(tmp_path: Path) -> str:
    """A store that the test may change."""
    url = f"sqlite:///{tmp_path / 'models.db'}"
    fill(url)
    return url


@pytest.fixture(scope="session")
def held_url(lasting_schema: Callable[[], str]) -> str:
    """Such a store on PostgreSQL, whose pages :func:`busy` can keep from being read."""
    url = lasting_schema()
    fill(url)
    return with_option(url, "timeout=600")  # so long a reader waits for them


@pytest.fixture
def busy(held_url: str, postgres_url: str) -> Busy:
    """Keep a thread of a server on ``held_url`` busy until a block ends; gives the future answer.

    It predicts with the model "slow", of which it has read no page yet: on no machine that is done
    before the block ends.
    """
    (schema,) = parse_qs(urlsplit(held_url).query)["schema"]
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 512], "data": [1.0] * 512}

    @contextlib.contextmanager
    def busy(server: Server) -> Iterator[Future[Answer]]:
        with ThreadPoolExecutor(1) as pool, psycopg.connect(postgres_url) as holder:
            holder.execute(f"LOCK TABLE {schema}.pages IN ACCESS EXCLUSIVE MODE")
            pending = pool.submit(server.infer, "slow", {"inputs": [entry]})
            until(lambda: server.metric("pydedup_running_batches") > 0)
            yield pending

    return busy
