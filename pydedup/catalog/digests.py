# SPDX-License-Identifier: Apache-2.0
"""Digests that name what a model holds: to compare models, or a model and its rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from pydedup.certificates import artifact_digest
from pydedup.types import TensorInfo

__all__ = ["ModelDigest", "tensors_digest"]


class ModelDigest:
    """Names what a model holds: names, dtypes and shapes of its tensors, hashes of their blocks."""

    def __init__(self) -> None:
        self._content = hashlib.blake2b(digest_size=16)

    def add(self, info: TensorInfo, hashes: bytes) -> None:
        """Take in the next tensor and the hashes of its source's blocks, 16 bytes each."""
        self._content.update(_head(info))
        self._content.update(hashes)

    def digest(self) -> bytes:
        """Return 16 bytes."""
        return self._content.digest()


def tensors_digest(tensors: Iterable[TensorInfo]) -> str:
    """Return what names the names, dtypes and shapes of a model's tensors."""
    return artifact_digest(b"".join(map(_head, tensors)))


def _head(info: TensorInfo) -> bytes:
    head = [info.name, info.dtype.label, list(info.shape), list(info.block_shape)]
    return json.dumps(head).encode()
