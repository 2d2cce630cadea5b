# SPDX-License-Identifier: Apache-2.0
"""What a writer of files is given of a stored model: each part is read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from pydedup.catalog import StoredModel
from pydedup.errors import CorruptStoreError
from pydedup.types import Progress

__all__ = ["ArtifactOnDemand", "TensorsOnDemand"]


class TensorsOnDemand:
    """A model's tensors by name, each loaded when a writer asks for it, with progress in bytes."""

    def __init__(
        self,
        read: Callable[[str], NDArray[Any]],
        total_bytes: int,
        progress: Progress | None,
    ) -> None:
        self._read = read
        self._total = total_bytes
        self._done = 0
        self._progress = progress

    def __getitem__(self, name: str) -> NDArray[Any]:
        array = self._read(name)
        self._done += array.nbytes
        if self._progress is not None:
            self._progress("reading", self._done, self._total)
        return array


@dataclass(frozen=True, slots=True)
class ArtifactOnDemand:
    """What came with a model beside its tensors, loaded when a writer asks for it."""

    name: str
    model: StoredModel

    @property
    def payload(self) -> bytes:
        """What it is. Raises CorruptStoreError, and NotFoundError when the model was removed."""
        payload = self.model.artifact(self.name)
        if payload is None:
            self.model.check_live()
            raise CorruptStoreError(f"{self.model.address}: its {self.name!r} is lost")
        return payload
