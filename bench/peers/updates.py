# SPDX-License-Identifier: Apache-2.0
"""The second add of a model, 5 % of whose blocks changed, against its first add.

    python bench/peers/updates.py [--only AREA] [--json]

Each round: a new database, the first version, then the second in a store that was opened anew, so
that nothing of the first is in memory but what the system's page cache holds. Medians of 5 rounds.
A changed block, as pydedup cuts them, has noise of 1 % of its tensor's spread on every weight.
"Scattered": each block with a chance of 5 %; "in one place": the tensors at the end, as many as
make 5 %.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _stored import Finding, Weights, main, said
from numpy.typing import NDArray
from released import members, only
from safetensors.numpy import load as load_safetensors

import pydedup
from pydedup.blocks import MatrixView
from pydedup.policies import Bounded, Exact, Lossless, Policy

ROUNDS = 5
CHANGED = 0.05


def noisy(array: NDArray[Any], rng: np.random.Generator, spread: float) -> NDArray[Any]:
    moved: NDArray[Any] = array + 0.01 * spread * rng.standard_normal(array.shape, np.float32)
    return moved.astype(array.dtype)


def scattered(weights: Weights) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    out = {}
    for name, array in weights.items():
        out[name] = copy = array.copy()
        if array.ndim != 2:
            continue
        spread = float(array.std())
        grid = MatrixView.of(array).grid
        for block in np.flatnonzero(rng.random(grid.count) < CHANGED):
            part = grid.area(int(block))
            copy[part] = noisy(copy[part], rng, spread)
    return out


def in_one_place(weights: Weights) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    out = {name: array.copy() for name, array in weights.items()}
    left = CHANGED * sum(array.nbytes for array in weights.values())
    for name, array in reversed(list(weights.items())):
        if array.ndim == 2 and array.nbytes <= left:
            out[name] = noisy(array, rng, float(array.std()))
            left -= array.nbytes
    return out


def models() -> Iterator[tuple[str, Weights]]:
    yield "MiniLM, 91 MB", load_safetensors(only(members("base", "model.safetensors")))
    rng = np.random.default_rng(3)
    drawn = {f"layer{i:02}": rng.standard_normal((1024, 1024), np.float32) for i in range(100)}
    yield "100 x 1024 x 1024 f32, 419 MB", drawn


def timed_adds(first: Weights, second: Weights, policy: Policy) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder) / "models.db"
        seconds = []
        for weights in (first, second):
            with contextlib.closing(pydedup.open(path)) as store:
                started = time.perf_counter()
                store.add("model", weights, policy=policy)
                seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1]


def second_add() -> Iterator[Finding]:
    """Yield both adds for each model, policy and way to change."""
    for name, weights in models():
        for how in (scattered, in_one_place):
            changed = how(weights)
            for policy in (Exact(), Lossless(), Bounded(0.001)):
                rounds = [timed_adds(weights, changed, policy) for _ in range(ROUNDS)]
                first, second = (statistics.median(times) for times in zip(*rounds, strict=True))
                case = f"{name}, {policy.name}, 5 % {how.__name__.replace('_', ' ')}"
                said(f"{case}: {rounds}")
                yield Finding(case, "first add", first, "s")
                yield Finding(case, "second add", second, "s")
                yield Finding(case, "times faster", first / second, "x", least=8)


if __name__ == "__main__":
    main(__doc__, [second_add])
