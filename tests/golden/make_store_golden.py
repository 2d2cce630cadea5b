# SPDX-License-Identifier: Apache-2.0
"""Writes store_v1.db.gz, a whole small store. Run only for a NEW schema version: old files stay."""

from __future__ import annotations

import gzip
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.graph import Graph, Node

TARGET = Path(__file__).with_name("store_v1.db.gz")


def numbers(count: int, seed: int) -> NDArray[np.uint32]:
    """A congruential generator: no library's random numbers are part of the golden file."""
    state, values = seed, np.empty(count, np.uint32)
    for i in range(count):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        values[i] = state
    return values


def models() -> dict[str, dict[str, NDArray[Any]]]:
    """What the golden store holds."""
    base = (numbers(300 * 40, 1).reshape(300, 40) / 2**32 - 0.5).astype(np.float32)
    tuned = base.copy()
    tuned[:20] *= np.float32(1.5)
    head = (numbers(3 * 40, 2).reshape(3, 40) / 2**32 - 0.5).astype(np.float32)
    odd = {
        "bf16": base.astype(ml_dtypes.bfloat16),
        "f64": base[:5].astype(np.float64),
        "ids": numbers(130, 3).astype(np.int64),
        "mask": numbers(70, 4) % 2 == 0,
        "scalar": np.array(7, np.int8),
        "empty": np.empty((0, 3), np.float16),
        "cube": base[:24].reshape(4, 6, 40),
    }
    return {
        "base@1": {"embedding": base, "head.weight": head},
        "tuned@1": {"embedding": tuned, "head.weight": head},
        "odd@żółw": odd,
    }


GRAPH = Graph(
    ("ids",),
    ("logits",),
    (
        Node("embedding_bag", ("ids",), "bag", {"weight": "embedding"}, {"mode": "mean"}),
        Node("linear", ("bag",), "logits", {"weight": "head.weight"}, {}),
    ),
)


def fill(url: str) -> None:
    """Put into an empty place what a golden store holds."""
    made = models()
    with pydedup.open(url) as store:
        store.add("base@1", made["base@1"], graph=GRAPH, metadata={"task": "golden"})
        store.add("tuned@1", made["tuned@1"], graph=GRAPH, policy=policies.Exact())
        store.add("odd@żółw", made["odd@żółw"])
        store.alias("base", "prod", "1")


def main() -> None:
    """Write the file, unless there is one."""
    if TARGET.exists():
        sys.exit(f"{TARGET} exists; golden files are never rewritten")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        fill(str(path))
        TARGET.write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))


if __name__ == "__main__":
    main()
