# SPDX-License-Identifier: Apache-2.0
"""Variants of one model on disk: in a store, and as the files that peers serve from.

Synthetic: a table of embeddings and dense layers as a text classifier has them, drawn from
N(0, 0.02). A variant has a tenth of its blocks of 64x64 anew, the rest is that of the base: what
row-wise fine-tuning with sharing leaves. Weights are written once, as safetensors files, which all
peers but torch.load can map: numpy.memmap and ONNX Runtime by the offsets in the header.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Shape", "build", "drop_from_cache", "map_file", "offsets"]

BLOCK = 64


@dataclass(frozen=True)
class Shape:
    """Rows and columns of the table (0 rows for none), and widths of the dense layers."""

    rows: int
    cols: int
    widths: tuple[int, ...]

    def tensors(self) -> dict[str, tuple[int, int]]:
        shapes = {"table": (self.rows, self.cols)} if self.rows else {}
        sizes = (self.cols, *self.widths)
        for i in range(len(self.widths)):
            shapes[f"dense{i:02}"] = (sizes[i + 1], sizes[i])
        return shapes

    @property
    def nbytes(self) -> int:
        return sum(4 * rows * cols for rows, cols in self.tensors().values())


def weights(shape: Shape, variant: int) -> dict[str, NDArray[np.float32]]:
    base = np.random.default_rng(0)
    own = np.random.default_rng(1000 + variant)
    made = {}
    for name, (rows, cols) in shape.tensors().items():
        array = base.standard_normal((rows, cols), np.float32)
        array *= np.float32(0.02)
        if variant:
            for row in range(0, rows, BLOCK):
                for col in range(0, cols, BLOCK):
                    if own.random() < 0.1:
                        part = array[row : row + BLOCK, col : col + BLOCK]
                        part[...] = own.standard_normal(part.shape, np.float32)
                        part *= np.float32(0.02)
        made[name] = array
    return made


def graph_of(shape: Shape) -> Any:
    from pydedup.graph import Graph, Node

    nodes = []
    value = "ids" if shape.rows else "x"
    if shape.rows:
        nodes.append(Node("embedding_bag", (value,), "bag", weights={"weight": "table"}))
        value = "bag"
    for i in range(len(shape.widths)):
        nodes.append(Node("linear", (value,), f"h{i}", weights={"weight": f"dense{i:02}"}))
        value = f"h{i}"
        if i + 1 < len(shape.widths):
            nodes.append(Node("relu", (value,), f"r{i}"))
            value = f"r{i}"
    return Graph(("ids",) if shape.rows else ("x",), (value,), tuple(nodes))


def build(folder: Path, shape: Shape, variants: int, *, pt: bool = False) -> None:
    """Write the files and the store of a family, unless they are there."""
    from safetensors.numpy import save_file

    import pydedup
    from pydedup.policies import Exact

    done = folder / "done.json"
    wanted = json.dumps([shape.rows, shape.cols, shape.widths, variants, pt])
    if done.exists() and done.read_text() == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    with pydedup.open(folder / "store.db", memory="1GiB") as store:
        for variant in range(variants):
            arrays = weights(shape, variant)
            save_file(arrays, folder / f"v{variant}.safetensors")
            if pt:
                import torch

                tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
                torch.save(tensors, folder / f"v{variant}.pt")
            store.add(
                f"v{variant}",
                arrays,
                graph=graph_of(shape),
                policy=Exact(),
                block_shape=(BLOCK, BLOCK),
            )
    done.write_text(wanted)


def offsets(path: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return where each tensor begins in a safetensors file, and its shape."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        name: (8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def map_file(path: Path) -> dict[str, NDArray[np.float32]]:
    return {
        name: np.memmap(path, np.float32, "r", offset, shape)
        for name, (offset, shape) in offsets(path).items()
    }


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the pages of the files of a folder."""
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
