# SPDX-License-Identifier: Apache-2.0
"""Values that every part of pydedup speaks of: dtypes and the reports users get.

Deliberately not here: anything that does I/O or arithmetic.
"""

from __future__ import annotations

import enum
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from pydedup.errors import ArgumentError

__all__ = [
    "GRAPH_ARTIFACT",
    "LARGEST_ID",
    "AddReport",
    "CopiedModel",
    "CopyReport",
    "DType",
    "ModelInfo",
    "Progress",
    "RowFailure",
    "ScoreReport",
    "TensorInfo",
    "check_progress",
    "shape_problem",
]

#: Name of the artifact that holds a model's graph.
GRAPH_ARTIFACT = "pydedup:graph.json"

#: What numpy 1.26 can hold.
_MAX_AXES = 32

#: No id of a model or a page is larger: 20 bits for what is numbered within one go behind it.
LARGEST_ID = (1 << 43) - 1


class Progress(Protocol):
    """Called with what is being done and how much of it is; ``total`` may be 0 at first."""

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Take notice; an exception ends the work, which is then undone."""


def check_progress(progress: object) -> None:
    """Raise ArgumentError for what cannot be called, before the work that it is to be told of."""
    if progress is not None and not callable(progress):
        raise ArgumentError(
            f"progress must be a function of (stage, done, total), not {progress!r:.100}"
        )


class DType(enum.Enum):
    """Element types that a store keeps. Codes are persisted in pages: never renumber."""

    F64 = (1, "f64", np.dtype(np.float64))
    F32 = (2, "f32", np.dtype(np.float32))
    F16 = (3, "f16", np.dtype(np.float16))
    BF16 = (4, "bf16", np.dtype(ml_dtypes.bfloat16))
    I8 = (5, "int8", np.dtype(np.int8))
    I16 = (6, "int16", np.dtype(np.int16))
    I32 = (7, "int32", np.dtype(np.int32))
    I64 = (8, "int64", np.dtype(np.int64))
    U8 = (9, "uint8", np.dtype(np.uint8))
    U16 = (10, "uint16", np.dtype(np.uint16))
    U32 = (11, "uint32", np.dtype(np.uint32))
    U64 = (12, "uint64", np.dtype(np.uint64))
    BOOL = (13, "bool", np.dtype(np.bool_))
    F8_E4M3 = (14, "f8_e4m3", np.dtype(ml_dtypes.float8_e4m3fn))
    F8_E5M2 = (15, "f8_e5m2", np.dtype(ml_dtypes.float8_e5m2))

    def __init__(self, code: int, label: str, numpy: np.dtype[Any]) -> None:
        self.code = code
        self.label = label
        self.numpy = numpy
        self.itemsize: int = numpy.itemsize

    @property
    def is_float(self) -> bool:
        """Whether elements are floating-point numbers."""
        return self.label.startswith(("f", "bf"))

    # There is one of each, and these are keys of many tables; an enum's own hash is Python code.
    __hash__ = object.__hash__

    @functools.cached_property
    def base_dtypes(self) -> tuple[DType, ...]:
        """Dtypes that the bases of deltas of this one can have (docs/format.md, "Deltas")."""
        convertible = (DType.F32, DType.BF16, DType.F16, DType.F64)
        return convertible if self in convertible else (self,)

    @property
    def has_distances(self) -> bool:
        """Whether blocks of it are at a distance that a bound can be of (`pydedup.similarity`)."""
        return DType.F32 in self.base_dtypes

    @classmethod
    def of(cls, dtype: np.dtype[Any]) -> DType:
        """Return the member for a numpy dtype of either byte order.

        Raises
        ------
        ArgumentError
            When pydedup does not store that dtype.
        """
        native = dtype.newbyteorder("=") if dtype.byteorder == ">" else dtype
        for member in cls:
            if member.numpy == native:
                return member
        raise ArgumentError(f"dtype {dtype} {cls.refusal(in_pairs=dtype.kind == 'c')}")

    @classmethod
    def of_code(cls, code: int) -> DType:
        """Return the member with that code, as pages carry it; ArgumentError for an unknown one."""
        for member in cls:
            if member.code == code:
                return member
        raise ArgumentError(f"unknown dtype code {code}")

    @classmethod
    def of_label(cls, label: str) -> DType:
        """Return the member with that label, e.g. ``"bf16"``; ArgumentError for an unknown one."""
        for member in cls:
            if member.label == label:
                return member
        known = ", ".join(member.label for member in cls)
        raise ArgumentError(f"unknown dtype {label!r}; choose one of: {known}")

    @classmethod
    def refusal(cls, *, in_bytes: bool = False, in_pairs: bool = False) -> str:
        """Say of a dtype that is none of these that it cannot be stored, and what can.

        ``in_bytes`` is whether torch has its values in a byte each, or several of them in one,
        ``in_pairs`` whether they are complex: converting them would drop the imaginary part.
        """
        if in_pairs:
            parts = "torch.view_as_real(tensor), or array.real and array.imag"
            return f"cannot be stored; give its real and imaginary parts ({parts})"
        known = ", ".join(member.label for member in cls)
        view = "give its bytes, which keep the bits (tensor.view(torch.uint8)), or " * in_bytes
        return f"cannot be stored; {view}convert it to one of: {known}"

    @classmethod
    def of_floats(cls, dtype: object) -> DType:
        """Return the member that weights, or results, are to be converted to.

        Parameters
        ----------
        dtype
            A label (``"f32"``), a dtype of numpy or torch, or its name (``"float32"``).

        Raises
        ------
        ArgumentError
            When it is none of floating point.
        """
        if isinstance(dtype, type):
            dtype = np.dtype(dtype)
        name = dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")
        if isinstance(dtype, cls):
            name = dtype.label
        floats = cls._floats()
        if name in floats:
            return floats[name]
        known = ", ".join(dict.fromkeys(member.label for member in floats.values()))
        raise ArgumentError(f"there is no dtype of floats {name!r}; choose one of: {known}")

    @classmethod
    @functools.cache
    def _floats(cls) -> Mapping[str, DType]:
        """Return those of floating point by label and by numpy's name."""
        floats = [member for member in cls if member.is_float]
        return {name: member for member in floats for name in (member.label, member.numpy.name)}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A named tensor of a stored model.

    Attributes
    ----------
    block_shape
        Rows and columns of a block of its matrix view.
    row_axes
        How many of its first axes are the rows of that: of a stack of matrices all but the last.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    block_shape: tuple[int, int]
    row_axes: int = 1

    @property
    def recorded_blocks(self) -> tuple[int, ...]:
        """How it is cut, as it is recorded (docs/format.md, "Tables")."""
        return self.block_shape if self.row_axes == 1 else (*self.block_shape, self.row_axes)

    @property
    def nbytes(self) -> int:
        """Size of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def shape_problem(shape: Sequence[int]) -> str | None:
    """Return why no array has a shape, or ``None``."""
    if len(shape) > _MAX_AXES:
        return f"has {len(shape)} axes; at most {_MAX_AXES} can be stored"
    # Not even one without elements.
    if min(shape, default=0) < 0 or math.prod(n or 1 for n in shape) > sys.maxsize // 16:
        return f"has the impossible shape {tuple(shape)!r:.200}"
    return None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the store knows of one version of a model."""

    id: int
    name: str
    version: str
    policy: str
    created_at: float
    logical_bytes: int
    digest: str
    aliases: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class AddReport:
    """What adding one model did (or would do, for a dry run).

    Attributes
    ----------
    logical_bytes
        Size of all tensors of the model as given.
    stored_bytes
        Bytes of blocks that were new to the store, as encoded.
    blocks, shared_blocks, delta_blocks
        Blocks of the model; those found in the store, in a model before it in the same add, or
        earlier in the model itself; those kept as a delta on a base.
    pages
        New pages written; one with blocks of several models of an add counts for the first.
    seconds
        Wall time.
    certificate
        The guarantee that holds for what was stored.
    left_out
        What the source holds beside the model, e.g. optimizer state, and is not stored; of one of
        several files of a model, the others.
    weights_key
        Of a torch checkpoint with more than weights in it, the key under which these were.
    damaged_pages
        Pages of the store that blocks were looked for on and that cannot be read; nothing on them
        was shared.
    artifact_bytes, stored_artifact_bytes
        What is kept beside the tensors, such as a tokenizer or a graph, and what of it was new to
        the store, as encoded. Small files are, with each version.
    """

    model: str
    logical_bytes: int
    stored_bytes: int
    blocks: int
    shared_blocks: int
    delta_blocks: int
    pages: int
    seconds: float
    certificate: Mapping[str, Any]
    dry_run: bool = False
    left_out: tuple[str, ...] = ()
    damaged_pages: tuple[int, ...] = ()
    artifact_bytes: int = 0
    stored_artifact_bytes: int = 0
    weights_key: str | None = None


@dataclass(frozen=True, slots=True)
class CopiedModel:
    """What became of one model of a copy.

    Attributes
    ----------
    status
        ``"copied"``; ``"replaced"`` (copied, in the place of another one); ``"there"`` (it was
        there already); ``"skip"`` (its name was taken, and it was left out); ``"gone"`` (somebody
        removed it from the source meanwhile); ``"damaged"`` (it was left out, being damaged). What
        follows is 0 unless it was copied.
    stored_bytes
        Bytes of blocks that were new to the destination, as encoded.
    blocks, shared_blocks, delta_blocks
        Blocks of the model and of its large artifacts; those that the destination had, or earlier
        blocks of the model are; those kept as a delta on a base.
    pages, whole_pages
        New pages written; those of them that are pages of the source, byte by byte.
    seconds
        Wall time.
    """

    model: str
    status: str
    logical_bytes: int
    stored_bytes: int = 0
    blocks: int = 0
    shared_blocks: int = 0
    delta_blocks: int = 0
    pages: int = 0
    whole_pages: int = 0
    seconds: float = 0.0

    @property
    def is_new(self) -> bool:
        """Whether this copy brought it."""
        return self.status in ("copied", "replaced")


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What a copy did.

    Attributes
    ----------
    source, target
        The URLs, without credentials.
    models
        One entry per model that was asked for, in the order of the source.
    aliases
        Aliases that these have at the destination.
    seconds
        Wall time.
    damaged
        With ``skip_damaged``, a sentence about each row or model that was left out, being damaged;
        of a row that cannot be read, ``models`` has no entry.
    """

    source: str
    target: str
    models: tuple[CopiedModel, ...]
    aliases: int
    seconds: float
    damaged: tuple[str, ...] = ()

    @property
    def copied(self) -> int:
        """How many models this copy brought."""
        return sum(model.is_new for model in self.models)

    @property
    def stored_bytes(self) -> int:
        """Bytes of blocks that were new to the destination, as encoded."""
        return sum(model.stored_bytes for model in self.models)


@dataclass(frozen=True, slots=True)
class RowFailure:
    """A row of a query that was not predicted, and why."""

    key: Any
    reason: str


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """What scoring the rows of a query did.

    Attributes
    ----------
    model
        ``name@version``: what the address that was given meant when the work began.
    table
        The table of predictions, with its schema where there is such a thing.
    rows, skipped, failed
        Rows that were predicted and written; those that were in the table; those that could not
        be predicted and were left out.
    failures
        The first of the failed rows.
    resumed
        Whether this run went on with a work that began with an alias, or the newest version, and
        did not come to its end.
    seconds
        Wall time.
    """

    model: str
    table: str
    rows: int
    skipped: int
    failed: int
    failures: tuple[RowFailure, ...]
    resumed: bool
    seconds: float
