# SPDX-License-Identifier: Apache-2.0
"""Arguments with fixed words: what editors offer for them is what is taken and what errors name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import pydedup
from pydedup import words
from pydedup.errors import ArgumentError, PydedupError
from pydedup.packing import pack
from pydedup.policies import Accuracy
from pydedup.quotas import Quotas
from pydedup.ray import score
from pydedup.ray.serving.application import deployment
from pydedup.replacement import Trace, replay
from pydedup.serving.tensor import StoredTensor
from pydedup.types import DType

_X = np.ones((2, 4), np.float32)
_TRACE = Trace(np.zeros(0, int), np.zeros(0, "u4"), np.zeros(0, "u4"), np.zeros(0, int))
_QUERY = "SELECT 1"

#: A public function, its argument, the type of that, and a call that gives the argument a value.
_TAKERS: list[tuple[Callable[..., Any], str, str, Callable[[Any, Any], object]]] = [
    (pydedup.open, "mode", "OpenMode", lambda s, w: pydedup.open(s.url, mode=w)),
    (pydedup.open, "replacement", "Replacement", lambda s, w: pydedup.open("m", replacement=w)),
    (replay, "policy", "ReplayPolicy", lambda _, w: replay(_TRACE, 1 << 20, w)),
    (pydedup.Store.export, "format", "FileFormat", lambda s, w: s.export("a", "x", format=w)),
    (
        pydedup.Store.score,
        "on_error",
        "OnError",
        lambda s, w: s.score(_QUERY, "a", into="p", on_error=w),
    ),
    (
        pydedup.Store.copy_to,
        "on_conflict",
        "OnConflict",
        lambda s, w: s.copy_to(f"{s.url}.other", on_conflict=w),
    ),
    (Quotas.set, "measure", "Measure", lambda s, w: s.quotas.set("k", "v", 1, measure=w)),
    (
        StoredTensor.matmul,
        "activation",
        "Activation",
        lambda s, w: s.tensor("a", "w").matmul(_X, activation=w),
    ),
    (
        StoredTensor.conv2d,
        "activation",
        "Activation",
        lambda s, w: s.tensor("a", "c").conv2d(np.ones((1, 2, 4, 4)), activation=w),
    ),
    (StoredTensor.bag, "mode", "BagMode", lambda s, w: s.tensor("a", "w").bag([[1]], mode=w)),
    (Accuracy, "order", "Order", lambda _, w: Accuracy(len, 0, order=w)),
    (Accuracy, "search", "Search", lambda _, w: Accuracy(len, 0, search=w)),
    (pack, "algorithm", "Algorithm", lambda _, w: pack([{1}], 1, algorithm=w)),
]
_RAY: list[tuple[Callable[..., Any], str, str, Callable[[Any, Any], object]]] = [
    (score, "on_error", "OnError", lambda s, w: score(_QUERY, s.url, "a", into="p", on_error=w)),
    (deployment, "routing", "Routing", lambda s, w: deployment(s.url, routing=w)),
    (deployment, "replacement", "Replacement", lambda s, w: deployment(s.url, replacement=w)),
]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pydedup.Store]:
    monkeypatch.chdir(tmp_path)
    with pydedup.open("m.db") as store:
        store.add("a", {"w": _X, "c": np.ones((2, 2, 3, 3), np.float32)})
        yield store


@pytest.mark.parametrize(("function", "argument", "alias", "call"), _TAKERS)
def test_an_editor_and_an_error_name_the_same_words(
    store: pydedup.Store,
    function: Callable[..., Any],
    argument: str,
    alias: str,
    call: Callable[[Any, Any], object],
) -> None:
    annotation = inspect.signature(function).parameters[argument].annotation
    assert annotation.removesuffix(" | None") == alias
    known = get_args(getattr(words, alias))
    assert known
    for wrong in ("swish", [known[0]], np.array(known[:2])):
        with pytest.raises(PydedupError) as caught:
            call(store, wrong)
        said = str(caught.value)
        assert said.startswith("unknown ")
        offered = re.split(r"choose one of:? |use ", said)[1]
        plain = re.sub(r" \([^)]*\)|'", "", offered).replace(" or ", ", ")
        assert plain.split(", ") == list(known)


@pytest.mark.parametrize(("function", "argument", "alias", "call"), _RAY)
def test_so_does_what_needs_ray(
    store: pydedup.Store,
    function: Callable[..., Any],
    argument: str,
    alias: str,
    call: Callable[[Any, Any], object],
) -> None:
    pytest.importorskip("ray")
    test_an_editor_and_an_error_name_the_same_words(store, function, argument, alias, call)


def test_each_name_of_a_dtype_is_taken() -> None:
    names = set(get_args(words._FloatName))
    taken = {
        label for dtype in DType if dtype.is_float for label in (dtype.label, dtype.numpy.name)
    }
    assert names == taken
    assert {DType.of_floats(name).is_float for name in names} == {True}
    with pytest.raises(ArgumentError, match="choose one of: f64, f32"):
        DType.of_floats("int8")
