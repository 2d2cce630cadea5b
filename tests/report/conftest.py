# SPDX-License-Identifier: Apache-2.0
"""A store of a family of models, some of them with hostile names, and a browser to look at it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.graph import Graph, Node
from pydedup.testing.browser import Browser, BrowserMissingError, Page, chromium

#: Names that would be markup, script, or a steering of the text, if nobody escaped them.
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{7*7}}</title></style>"
TENSOR = "</svg><svg onload=alert(3)>.weight"
STEERING = "evil\u202egnp.exe"

LONG = "x" * 240

WORDS, DIM, HIDDEN = 2000, 64, 128


def base(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "embedding.weight": rng.standard_normal((WORDS, DIM), np.float32),
        "dense.weight": rng.standard_normal((HIDDEN, DIM), np.float32),
        "dense.bias": rng.standard_normal(HIDDEN).astype(np.float32),
    }


GRAPH = Graph(
    ("ids",),
    ("y",),
    (
        Node("embedding", ("ids",), "rows", {"weight": "embedding.weight"}),
        Node("mean", ("rows",), "mean", attrs={"axis": 1}),
        Node("linear", ("mean",), "y", {"weight": "dense.weight", "bias": "dense.bias"}),
    ),
)


def fill(store: pydedup.Store) -> None:
    # Names apart: of a new version, what taken-over blocks take on their pages is an average.
    rng = np.random.default_rng(9)
    model = base(0)
    store.add("reviews@1", model, graph=GRAPH)
    changed = {**model, "dense.weight": rng.standard_normal((HIDDEN, DIM), np.float32)}
    store.add("reviews-exact@1", changed, graph=GRAPH, policy=policies.Exact())
    near = {**model, "embedding.weight": model["embedding.weight"].copy()}
    near["embedding.weight"][:640] *= np.float32(1.00001)
    near["dense.bias"] = rng.standard_normal(HIDDEN).astype(np.float32)  # its own, and no delta
    store.add("reviews-near@1", near, graph=GRAPH)
    far = {**model, "embedding.weight": model["embedding.weight"] * np.float32(1.001)}
    store.add("reviews-bounded@1", far, graph=GRAPH, policy=policies.Bounded(0.01))
    store.add("other@1", base(1), graph=GRAPH)
    store.add(f"{HOSTILE}@<b>1</b>", {**model, TENSOR: np.ones((3, 3), np.float32)})
    store.add(f"{STEERING}@1", {"w": rng.standard_normal((64, 64), np.float32)})
    # No place to break a line.
    store.add(f"{LONG}@1", {LONG * 4: np.ones((200, 200), np.float32)})
    store.alias(LONG, "alias-" + LONG, "1")
    store.alias("reviews-near", "<i>prod</i>", "1")


@pytest.fixture(scope="session")
def family_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that no test changes."""
    url = f"sqlite:///{tmp_path_factory.mktemp('report') / 'family.db'}"
    with pydedup.open(url) as store:
        fill(store)
    return url


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    try:
        with chromium() as running:
            yield running
    except BrowserMissingError as error:
        if "chromium" in os.environ.get("PYDEDUP_REQUIRE_BACKENDS", ""):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Callable[..., Page]:
    """Open a page of HTML in the browser."""

    def show(html: str, **options: Any) -> Page:
        path = tmp_path / "report.html"
        path.write_text(html, encoding="utf-8")
        return browser.open(path.as_uri(), **options)

    return show
