# SPDX-License-Identifier: Apache-2.0
"""Writes whole small stores. Run only for a NEW schema version, or kind of row: old files stay.

make_store_golden.py stacks FLAT writes store_v1_stacks.db.gz: to a store FLAT, which pydedup of
before there were stacks of matrices made by ``make_store_golden.py flat FLAT``, it adds one.
make_store_golden.py artifacts writes store_v1_artifacts.db.gz, of models with large artifacts.
"""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

import pydedup
from pydedup import policies
from pydedup.graph import Graph, Node

TARGET = Path(__file__).with_name("store_v1.db.gz")
STACKS = Path(__file__).with_name("store_v1_stacks.db.gz")
ARTIFACTS = Path(__file__).with_name("store_v1_artifacts.db.gz")


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


def stacks() -> dict[str, dict[str, NDArray[Any]]]:
    """What that of stacks holds: one that is cut as one matrix, and one whose matrices are."""
    values = (numbers(3 * 130 * 144, 5) >> 30).astype(np.float32).reshape(3, 130, 144)
    apart = values + 4
    moved = apart.copy()
    moved[1, 70] += np.float32(2**-12)
    return {"flat@1": {"experts": values}, "stack@1": {"experts": apart}, "m@1": {"experts": moved}}


def tokenizers() -> dict[str, bytes]:
    """The artifacts that models of that of artifacts have, which are all they differ in."""
    words = " ".join(map(str, numbers(13_000, 6)))
    return {
        "one@1": words.encode(),
        "two@1": b"more " + words.encode(),
        "few@1": words[:20_000].encode(),
    }


def add_artifacts(path: Path) -> None:
    """Fill a store with them."""
    with tempfile.TemporaryDirectory() as folder, pydedup.open(path) as store:
        save_file({"w": np.ones((2, 3), np.float32)}, f"{folder}/model.safetensors")
        for address, content in tokenizers().items():
            Path(folder, "tokenizer.json").write_bytes(content)
            store.add(address, folder)


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


def add_stacks(path: Path, *addresses: str) -> None:
    """Add some of these models to a store."""
    made = stacks()
    with pydedup.open(path) as store:
        for address in addresses:
            store.add(address, made[address])


def main(what: str = "", path: str = "") -> None:
    """Write the file, unless there is one."""
    if what == "flat":
        return add_stacks(Path(path), "flat@1")
    target = {"stacks": STACKS, "artifacts": ARTIFACTS}.get(what, TARGET)
    if target.exists():
        sys.exit(f"{target} exists; golden files are never rewritten")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store.db"
        if what == "stacks":
            shutil.copyfile(path, store)
            add_stacks(store, "stack@1", "m@1")
        elif what == "artifacts":
            add_artifacts(store)
        else:
            fill(str(store))
        target.write_bytes(gzip.compress(store.read_bytes(), 9, mtime=0))
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
