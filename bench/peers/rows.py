# SPDX-License-Identifier: Apache-2.0
"""Rows of an embedding table on the pages of a pool beside torch's embedding and embedding_bag.

    python bench/peers/rows.py [--seconds S] [--only AREA] [--json]

32 x 128 random ids of a table of 400,000 x 300 in f32 (480 MB), two threads on both sides. "from
memory": 16 sets of ids in turn, whose rows together are 79 MB; "in cache": one set again and again.
Gathered rows are equal bit for bit, bags to what f32 sums may differ by.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import Row, compare, main
from numpy.typing import NDArray

import pydedup
from pydedup import policies

Array = NDArray[Any]
ROWS, COLS = 400_000, 300
BAGS, BAG = 32, 128
SETS = 16
ROW_BYTES = COLS * 4


def ids() -> list[Array]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, ROWS, (BAGS, BAG)) for _ in range(SETS)]


@contextmanager
def tables() -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield the table as a stored tensor, all of its pages in the pool, and as torch's."""
    table = np.random.default_rng(0).standard_normal((ROWS, COLS), np.float32)
    with (
        tempfile.TemporaryDirectory() as folder,
        pydedup.open(Path(folder) / "m.db", memory="2GiB") as store,
    ):
        store.add("m", {"w": table}, policy=policies.Exact())
        stored = store.tensor("m", "w")
        stored.take(np.arange(ROWS))
        yield stored, torch.from_numpy(table)


def in_turn(call: Callable[[Any], object], given: list[Any]) -> Callable[[], object]:
    """Return a call that takes the next of `given` each time."""
    each = itertools.cycle(given)
    return lambda: call(next(each))


def both_ways(
    what: str,
    ours: Callable[[Any], object],
    theirs: Callable[[Any], object],
    seconds: float,
    peer: str,
    target: float | None = None,
) -> Iterator[Row]:
    given = ids()
    for where, sets in (("from memory", given), ("in cache", given[:1])):
        yield from compare(
            f"{what}, {where}",
            unit="GB/s",
            work=BAGS * BAG * ROW_BYTES,
            sides={
                "pydedup": in_turn(ours, sets),
                peer: in_turn(theirs, [torch.from_numpy(one) for one in sets]),
            },
            seconds=seconds,
            target=target,
            settle=True,
        )


def gather(seconds: float) -> Iterator[Row]:
    """Yield the rows of ids."""
    with tables() as (stored, whole):
        some = ids()[0]
        expected = torch.nn.functional.embedding(torch.from_numpy(some), whole).numpy()
        assert np.array_equal(stored.take(some).view(np.uint32), expected.view(np.uint32))
        yield from both_ways(
            f"{BAGS} x {BAG} rows",
            stored.take,
            lambda one: torch.nn.functional.embedding(one, whole),
            seconds,
            "torch embedding",
            target=0.8,
        )


def bags(seconds: float) -> Iterator[Row]:
    """Yield sums and means of bags of 128."""
    with tables() as (stored, whole):
        for mode in ("sum", "mean"):

            def theirs(one: torch.Tensor, mode: str = mode) -> torch.Tensor:
                return torch.nn.functional.embedding_bag(one, whole, mode=mode)

            def ours(one: Array, mode: str = mode) -> Array:
                bag: Array = stored.bag(one, mode=mode)
                return bag

            some = ids()[0]
            got, expected = ours(some), theirs(torch.from_numpy(some)).numpy()
            assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()
            yield from both_ways(
                f"{mode} of {BAG} rows, {BAGS} bags", ours, theirs, seconds, "torch embedding_bag"
            )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(__doc__, [gather, bags])
