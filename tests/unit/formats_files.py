# SPDX-License-Identifier: Apache-2.0
"""What the tests of file formats have in common."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from pydedup.formats.registry import open_source, write_model


def export(source: Path, target: Path, **more: Any) -> None:
    """Write what a file or folder holds to another."""
    with open_source(source) as opened:
        tensors = {entry.name: opened.read(entry.name) for entry in opened.entries}
        write_model(target, tensors, opened.entries, opened.artifacts(), opened.graph, **more)


def is_mapped(array: Any) -> bool:
    """Return whether an array is a view of a memory-mapped file."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array.obj if isinstance(array, memoryview) else array, mmap.mmap)
