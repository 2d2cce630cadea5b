# SPDX-License-Identifier: Apache-2.0
"""What every reader gives and every writer takes: tensor entries, artifacts, a source.

Readers never hold a whole model: ``read`` returns one tensor, as a read-only view of the file
where its bytes lie there as they are, else as a copy of that tensor alone. Names of artifacts
that were files keep their path inside the model's folder; artifacts that pydedup derives (a graph
without weights, a vocabulary) start with ``pydedup:`` so that no file can be mistaken for one.

Deliberately not here: bytes of any particular format, and the choice between formats
(:mod:`pydedup.formats.registry`).
"""

from __future__ import annotations

import abc
import contextlib
import json
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from pydedup.errors import ArgumentError, BudgetError, CorruptStoreError, FormatError, NotFoundError
from pydedup.graph import Graph
from pydedup.types import DType, shape_problem
from pydedup.words import FileFormat

__all__ = [
    "DERIVED",
    "WRITABLE",
    "Array",
    "Artifact",
    "LazyArtifact",
    "LazyTensors",
    "ModelSource",
    "Outgoing",
    "TensorEntry",
    "checked_entries",
    "find_artifact",
    "find_object",
    "name_problem",
]

Array: TypeAlias = npt.NDArray[Any]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

#: Prefix of artifacts that were no file of their own.
DERIVED = "pydedup:"

#: What `pydedup.formats.registry.write_model` can write, by name.
WRITABLE = get_args(FileFormat)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor that a source can read.

    Attributes
    ----------
    name
        Unique within the source.
    dtype, shape
        As stored; a scalar has the shape ``()``.
    key
        Two entries with equal keys are the same view of the same storage (tied weights).
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    key: Hashable

    @property
    def nbytes(self) -> int:
        """Size of the tensor's elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something that belongs to a model and is no tensor: config, tokenizer, vocabulary."""

    name: str
    media_type: str
    payload: bytes


class LazyArtifact(Protocol):
    """What a writer takes for an artifact, whose payload may be loaded on demand."""

    @property
    def name(self) -> str:
        """As it is of an `Artifact`."""

    @property
    def payload(self) -> bytes:
        """As it is of an `Artifact`."""


class LazyTensors(Protocol):
    """What a writer takes tensors from: any mapping whose look-up may load on demand."""

    def __getitem__(self, name: str, /) -> Array:
        """Return one tensor."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A model that is to be written.

    Attributes
    ----------
    tensors, entries
        Its tensors, and what they are: dtypes, shapes and ties.
    artifacts
        What the source of the model gave.
    graph
        Its layers, where they are known.
    """

    tensors: LazyTensors
    entries: Sequence[TensorEntry]
    artifacts: Sequence[LazyArtifact] = ()
    graph: Graph | None = None

    def fetch(self, entry: TensorEntry) -> Array:
        """Return a tensor, C-contiguous, after checking that it is what was announced.

        Raises
        ------
        ArgumentError
            When its dtype or shape is not that of the entry.
        """
        array = np.asarray(self.tensors[entry.name])
        if array.dtype != entry.dtype.numpy or array.shape != entry.shape:
            raise ArgumentError(
                f"tensor {entry.name!r} is {array.dtype} {array.shape}, announced as "
                f"{entry.dtype.label} {entry.shape}"
            )
        return np.ascontiguousarray(array).reshape(entry.shape)


class ModelSource(abc.ABC):
    """An open model, to be used as a context manager. Arrays read from it outlive it.

    A subclass calls ``_set_entries`` and has ``_read``.

    Attributes
    ----------
    format
        Name of the format, e.g. ``"safetensors"``.
    description
        What messages call this source, usually its path.
    left_out
        What the source holds and pydedup does not take, e.g. optimizer state.
    weights_key
        The key, of a checkpoint that has one, under which the weights were.
    has_program
        Whether it says itself what is computed. Such a model may have no tensors.
    """

    format: str = ""
    has_program: bool = False

    def __init__(self, description: str) -> None:
        self.description = description
        self.left_out: tuple[str, ...] = ()
        self.weights_key: str | None = None
        self._entries: tuple[TensorEntry, ...] = ()
        self._by_name: dict[str, TensorEntry] = {}

    @property
    def entries(self) -> Sequence[TensorEntry]:
        """All tensors, in the order of the file."""
        return self._entries

    @property
    def graph(self) -> Graph | None:
        """The layers, when they are certain."""
        return None

    def read(self, name: str) -> Array:
        """Return one tensor: C-contiguous, native byte order, read-only.

        Raises NotFoundError for an unknown name, FormatError where its bytes are missing or
        damaged, BudgetError where memory is short.
        """
        entry = self._by_name.get(name)
        if entry is None:
            raise NotFoundError(f"{self.description} has no tensor {name!r}")
        try:
            array = self._read(entry)
        except MemoryError as exc:
            raise BudgetError(
                f"{self.description}: no memory for the {entry.nbytes} bytes of tensor {name!r}"
            ) from exc
        # An overlay dtype (bfloat16 over raw bits) or a damaged reader would show here, before
        # wrong bytes reach a store.
        if array.shape != entry.shape or array.dtype != entry.dtype.numpy:
            raise FormatError(
                f"{self.description}: tensor {name!r} read as {array.dtype} {array.shape}, "
                f"but its header says {entry.dtype.label} {entry.shape}"
            )
        if array.flags.writeable:
            array = array.view()
            array.flags.writeable = False
        return array

    def artifacts(self) -> Iterator[Artifact]:
        """Yield what belongs to the model besides tensors, one at a time."""
        return iter(())

    def close(self) -> None:  # noqa: B027 - a source without files has nothing to give back
        """Give back files and temporary space. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        """Give back what was opened when the rest of opening fails."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _set_entries(self, entries: Iterable[TensorEntry]) -> None:
        self._entries = checked_entries(self.description, entries)
        self._by_name = {entry.name: entry for entry in self._entries}

    @abc.abstractmethod
    def _read(self, entry: TensorEntry) -> Array:
        """Return the tensor, C-contiguous and in native byte order."""


def checked_entries(description: str, entries: Iterable[TensorEntry]) -> tuple[TensorEntry, ...]:
    """Return the entries if their names can be stored and are unique.

    Raises
    ------
    FormatError
        Naming the first one whose name is empty, repeated or no valid Unicode text, or whose
        shape is that of no array.
    """
    result = tuple(entries)
    seen: set[str] = set()
    for entry in result:
        problem = name_problem(entry.name)
        if problem is None and entry.name in seen:
            problem = "occurs twice"
        problem = problem or shape_problem(entry.shape)
        if problem is not None:
            raise FormatError(f"{description}: tensor name {entry.name!r:.80} {problem}")
        seen.add(entry.name)
    return result


def name_problem(name: object) -> str | None:
    """Return why ``name`` cannot be a tensor's name, or ``None``."""
    if not isinstance(name, str):
        return "is no text"
    if not name:
        return "is empty"
    if _CONTROL.search(name):
        return "holds control characters"
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        return "is no valid Unicode text"
    if len(encoded) > 1024:
        return f"has {len(encoded)} bytes; at most 1024 can be stored"
    return None


def find_artifact(artifacts: Iterable[LazyArtifact], name: str) -> bytes | None:
    """Return the payload of the artifact with that name, or ``None``."""
    for artifact in artifacts:
        if artifact.name == name:
            return artifact.payload
    return None


def find_object(artifacts: Iterable[LazyArtifact], name: str) -> dict[str, Any] | None:
    """Return the JSON object that a reader left as the artifact with that name, or ``None``.

    Raises CorruptStoreError where it is none any more.
    """
    payload = find_artifact(artifacts, name)
    try:
        return None if payload is None else dict(json.loads(payload))
    except (ValueError, TypeError, RecursionError) as exc:
        raise CorruptStoreError(
            f"the artifact {name!r} of the model is damaged ({exc}); restore a backup, or export "
            "to another format"
        ) from exc
