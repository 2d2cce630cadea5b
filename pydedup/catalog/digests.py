# SPDX-License-Identifier: Apache-2.0
"""Digests that name what a model holds: to compare models, or a model and its rows.

Those of block maps change with the places of blocks, and are recorded in the certificate.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache

from pydedup.catalog.pages import page_tags, tags_in
from pydedup.catalog.rows import recorded_object, with_recorded
from pydedup.certificates import MAPS, PAGES, artifact_digest
from pydedup.errors import CorruptStoreError
from pydedup.sets import in_parts
from pydedup.types import TensorInfo

__all__ = ["ModelDigest", "map_digest", "tensors_digest", "with_other_maps"]


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


def map_digest(parts: Iterable[bytes]) -> str:
    """Return eight characters that tell whether the parts of a block map are those recorded."""
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        digest.update(part)
    return base64.b64encode(digest.digest()).decode()


def with_other_maps(certificate: str, digests: Mapping[int, str], tags: Mapping[int, bytes]) -> str:
    """Return a recorded certificate with other digests of some block maps, by ordinal.

    ``tags`` are those of the pages that the model reads then; what was recorded of a page stays.
    One that has no digests stays as it is.
    """
    try:
        found = recorded_object(certificate, "a certificate")
    except CorruptStoreError:
        return certificate
    old = found.get(MAPS)
    if not isinstance(old, str):
        return certificate
    size = len(map_digest(()))
    maps = "".join(digests.get(number, one) for number, one in enumerate(in_parts(old, size)))
    known_tags = tags_in(found.get(PAGES))
    pages = {page_id: known_tags.get(page_id, tag) for page_id, tag in tags.items()}
    return with_recorded(certificate, {MAPS: maps, PAGES: page_tags(pages)})


@lru_cache(maxsize=8192)  # models of a family have the same ones
def _head(info: TensorInfo) -> bytes:
    head = [info.name, info.dtype.label, list(info.shape), list(info.recorded_blocks)]
    return json.dumps(head).encode()
