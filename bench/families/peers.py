# SPDX-License-Identifier: Apache-2.0
"""The six classifiers stored in other ways: exact only, min-hash matching, pairwise comparison.

    python bench/families/peers.py [--quick]

Both searches of other papers (`_baselines.py`) share as the paper that we follow does: blocks by
ascending magnitude, an evaluation after each 32nd of them; the first batch that takes validation
accuracy more than a point below the original is taken back and ends it. What comes of that is
stored with `Exact`, so that every figure is the size of an SQLite file. Detection is timed by
itself, on the blocks of two of the tables.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from _baselines import Detector, MinHash, Ours, Pairwise, Products
from _classifiers import FAMILIES, FURTHER, SIX, trained
from _measure import Member, console, options, store_family
from numpy.typing import NDArray
from rich.table import Table
from text import members

from pydedup import policies
from pydedup.hashing import hash_buffer
from pydedup.similarity import magnitude

_TABLE, _SHAPE = "embedding.weight", (80, 50)
_ELEMENTS = _SHAPE[0] * _SHAPE[1]
_BATCHES, _MAX_DROP = 32, 0.01
_SAMPLE = 100


def blocks_of(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """Return the whole blocks of the table, (n, elements), where they lie."""
    table = arrays[_TABLE]
    whole = len(table) // _SHAPE[0] * _SHAPE[0]
    return table[:whole].reshape(-1, _ELEMENTS)


def shared(found: list[Member], detector: Detector) -> list[Member]:
    """Return the models with blocks replaced as a detector and the validation texts want it."""
    distinct: list[NDArray[np.float32]] = []
    known: set[bytes] = set()
    stored = []
    for member in found:
        arrays = {name: np.array(value) for name, value in member.arrays.items()}
        blocks = blocks_of(arrays)
        hashes = [hash_buffer(block) for block in blocks]
        new = np.array([i for i, key in enumerate(hashes) if key not in known], np.int64)
        near = detector.nearest(blocks[new])
        assert isinstance(member.policy, policies.Accuracy)
        evaluate = member.policy.evaluate
        before = float(np.mean(evaluate(arrays)))
        order = np.argsort(magnitude(blocks[new].reshape(-1, *_SHAPE)))
        order = order[near[order] >= 0]
        size = max(1, -(-len(order) // _BATCHES))
        kept = np.ones(len(new), np.bool_)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            old = blocks[new[batch]].copy()
            blocks[new[batch]] = [distinct[number] for number in near[batch]]
            if before - float(np.mean(evaluate(arrays))) > _MAX_DROP:
                blocks[new[batch]] = old
                break
            kept[batch] = False
        mine = new[kept]
        detector.add(blocks[mine])
        distinct += [block.copy() for block in blocks[mine]]
        known.update(hashes[i] for i in mine.tolist())
        stored.append(Member(member.name, arrays, policies.Exact()))
    return stored


def sizes(found: list[Member]) -> Table:
    room = len(found) * len(blocks_of(found[0].arrays))
    plain = [Member(m.name, m.arrays, policies.Exact()) for m in found]
    ways: dict[str, Callable[[], list[Member]]] = {
        "exact only": lambda: plain,
        "min-hash": lambda: shared(found, MinHash(_ELEMENTS)),
        "pairwise": lambda: shared(found, Products(room, _ELEMENTS)),
        "pydedup, Lossless": lambda: [Member(m.name, m.arrays, policies.Lossless()) for m in found],
        "pydedup, Accuracy": lambda: found,
    }
    table = Table("way", title="Stores of the classifiers", title_justify="left")
    for column in ("file, MB", "of raw", "held-out drop, points", "worst", "seconds"):
        table.add_column(column, justify="right")
    for way, made in ways.items():
        started = time.perf_counter()
        stored = made()
        result = store_family(way, stored, tell=False)
        seconds = time.perf_counter() - started
        drops = []
        for member, after in zip(found, stored, strict=True):
            if way == "pydedup, Accuracy":
                drops.append(next(m.drop for m in result.members if m.name == member.name))
            else:
                assert member.held_out is not None
                before, now = member.held_out(member.arrays), member.held_out(after.arrays)
                drops.append(float(np.mean(before) - np.mean(now)))
        table.add_row(
            way,
            f"{result.file_bytes / 1e6:.1f}",
            f"1/{result.logical / result.file_bytes:.2f}",
            f"{100 * np.mean(drops):+.2f}",
            f"{100 * max(drops):+.2f}",
            f"{seconds:.0f}",
        )
    return table


def detection(found: list[Member]) -> Table:
    """Time how the blocks of the second model that the first has not find theirs there."""
    first, second = (blocks_of(member.arrays) for member in found[:2])
    new = np.flatnonzero((first.view(np.uint32) != second.view(np.uint32)).any(axis=1))
    asked = second[new]
    table = Table(
        "way",
        title=f"Detection: {len(asked):,} blocks of {found[1].name} among {len(first):,}",
        title_justify="left",
    )
    for column in ("adding, s", "finding, s", "found", "same place", "pydedup is faster"):
        table.add_column(column, justify="right")
    room, ours = len(first), 0.0
    warm = Ours(64, _SHAPE, 0.25)
    warm.add(first[:64])
    warm.nearest(asked[:64])
    detectors: dict[str, Detector] = {
        "pydedup": Ours(room, _SHAPE, 0.25),
        "min-hash": MinHash(_ELEMENTS),
        "pairwise, by matrix products": Products(room, _ELEMENTS),
        "pairwise": Pairwise(room, _ELEMENTS),
    }
    for way, detector in detectors.items():
        sampled = way == "pairwise"
        rows = np.arange(0, len(asked), len(asked) // _SAMPLE) if sampled else np.arange(len(asked))
        started = time.perf_counter()
        detector.add(first)
        added = time.perf_counter() - started
        started = time.perf_counter()
        near = detector.nearest(asked[rows])
        seconds = (time.perf_counter() - started) * len(asked) / len(rows)
        ours = ours or added + seconds
        table.add_row(
            f"{way} (from {len(rows)} blocks)" if sampled else way,
            f"{added:.2f}",
            f"{seconds:.2f}",
            f"{100 * np.mean(near >= 0):.1f} %",
            f"{100 * np.mean(near == new[rows]):.1f} %",
            f"{(added + seconds) / ours:.1f}x",
        )
    return table


def run(chosen: argparse.Namespace) -> None:
    for which in list(FAMILIES)[: 1 if chosen.quick else 2]:
        names = SIX[:4] if chosen.quick else SIX + FURTHER
        found = members(trained(which, chosen.cache, console, names), names[:6])
        console.print(f"[bold]{which}")
        console.print(detection(found))
        console.print(sizes(found))


if __name__ == "__main__":
    run(options(__doc__))
