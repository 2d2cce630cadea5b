# SPDX-License-Identifier: Apache-2.0
"""Writes hash_v1.json with the scalar kernel. Run only for a NEW hash version: old files stay."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # before pydedup is there; not when a test imports this file
    os.environ["PYDEDUP_KERNEL"] = "scalar"

from pydedup.hashing import hash_buffer

LENGTHS = [
    0,
    1,
    3,
    8,
    16,
    63,
    64,
    65,
    127,
    128,
    129,
    200,
    255,
    256,
    1023,
    1024,
    1025,
    4096,
    16384,
    65537,
]

data = bytearray()
state = 1
for _ in range(70000):
    state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
    data.append(state >> 24)
vectors = [
    {"length": length, "seed": seed, "digest": hash_buffer(bytes(data[:length]), seed=seed).hex()}
    for length in LENGTHS
    for seed in (0, 1, 0xFEDCBA9876543210)
]
target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("hash_v1.json")
if target.exists():
    sys.exit(f"{target} exists; golden files are never rewritten")
target.write_text(json.dumps({"hash_version": 1, "vectors": vectors}, indent=1) + "\n")
