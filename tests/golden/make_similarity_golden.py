# SPDX-License-Identifier: Apache-2.0
"""Writes similarity_v1.json with the scalar kernel. Run only for a NEW version: old files stay."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # before pydedup is there; not when a test imports this file
    os.environ["PYDEDUP_KERNEL"] = "scalar"

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pydedup.similarity import L2LSH

DTYPES = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
CASES = [
    {"dtype": "f32", "shape": [64, 64], "bands": 8, "rows": 8, "seed": 0},
    {"dtype": "f32", "shape": [7, 300], "bands": 5, "rows": 13, "seed": 1},
    {"dtype": "f32", "shape": [3, 2050], "bands": 2, "rows": 4, "seed": 2},
    {"dtype": "f64", "shape": [20, 33], "bands": 3, "rows": 5, "seed": 2**64 - 1},
    {"dtype": "f16", "shape": [16, 16], "bands": 1, "rows": 1, "seed": 5},
    {"dtype": "bf16", "shape": [50, 10], "bands": 16, "rows": 16, "seed": 6},
]


def golden_blocks(dtype: str, shape: list[int]) -> NDArray[np.generic]:
    """Blocks of a fixed congruential generator: a few, two equal, a zero and one with a NaN."""
    state, numbers = 1, []
    for _ in range(6 * shape[0] * shape[1]):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        numbers.append((state >> 25) - 64)
    blocks = (np.array(numbers, np.float64) / 64).reshape(6, *shape)
    blocks[2] = blocks[0]
    blocks[3] = 0
    blocks[4, -1, -1] = np.nan
    return blocks.astype(DTYPES[dtype])


def golden_index(case: dict) -> L2LSH:
    """The index of a case."""
    index = L2LSH(
        tuple(case["shape"]),
        DTYPES[case["dtype"]],
        r=0.5,
        bands=case["bands"],
        rows=case["rows"],
        seed=case["seed"],
    )
    index.add(golden_blocks(case["dtype"], case["shape"]), [10, 2**40, 11, 12, 0, 3])
    return index


if __name__ == "__main__":
    target = Path(
        sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("similarity_v1.json")
    )
    if target.exists():
        sys.exit(f"{target} exists; golden files are never rewritten")
    indexes = [{**case, "payload": golden_index(case).save().hex()} for case in CASES]
    target.write_text(json.dumps({"similarity_version": 1, "indexes": indexes}, indent=1) + "\n")
