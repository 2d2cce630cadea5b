# SPDX-License-Identifier: Apache-2.0
"""What is to be added: named, opened and checked before a single byte is hashed."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pydedup.accuracy import number
from pydedup.adapter import Adapter
from pydedup.arguments import as_block_shape
from pydedup.blocks import MatrixView, matrix_shape, row_axes
from pydedup.catalog import taken_versions
from pydedup.certificates import MEASURED
from pydedup.errors import ArgumentError, ConflictError, DuplicateError
from pydedup.formats.base import ModelSource, TensorEntry
from pydedup.graph import Graph
from pydedup.layout import MOST_BLOCK_BYTES
from pydedup.names import check_name, parse_address
from pydedup.policies import Accuracy, Bounded, Policy

__all__ = ["Request", "Taken", "plan_address"]

#: What all policies have, those of users too (`pydedup.policies.Policy`).
_POLICY = ("name", "compresses", "uses_deltas", "max_rel_error", "parameters")

#: Names of which certificates are told to say more than all policies' do.
_OURS = {"bounded": Bounded, "accuracy": Accuracy}
#: How deep JSON may be: Python 3.11 reads less than a thousand.
_DEEPEST = 500
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"|[][{}]')


@dataclass(slots=True)
class Request:
    """One model of an add: where it goes, where it comes from, and under which guarantee."""

    name: str
    version: str
    source: ModelSource
    policy: Policy
    graph: Graph | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    block_shape: tuple[int, int] | None = None
    #: Whether the version is the next number, and not one that somebody asked for.
    is_numbered: bool = False
    #: By name, of tensors of which the graph tells more than `blocks.row_axes` can: a kernel of a
    #: convolution is no stack of matrices, as large as it may be.
    row_axes: Mapping[str, int] = field(init=False, repr=False)
    #: By name, of tensors that are not cut by default; None until that is known (cuts.py).
    cuts: Mapping[str, tuple[int, int]] | None = field(default=None, init=False, repr=False)
    #: Tensors as they were read before code of the user ran, by name.
    _first_read: dict[str, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Refuse what is no policy, graph or metadata; raises ArgumentError."""
        _check_policy(self.policy)
        graph: object = self.graph
        if not isinstance(graph, Graph | None):
            raise ArgumentError(
                f"a graph must be a pydedup.graph.Graph, not {type(graph).__name__}; "
                "Graph.from_json reads one from text"
            )
        metadata: object = self.metadata
        if not isinstance(metadata, Mapping):
            raise ArgumentError(
                f"metadata {metadata!r} is no mapping, such as {{'tenant': 'acme'}}"
            )
        self.metadata_json()
        nodes = () if self.graph is None else self.graph.nodes
        kernels = {node.weights["weight"] for node in nodes if node.op == "conv2d"}
        # Tied tensors have the same blocks, so that all are cut as the one that the graph names.
        tied = {entry.key for entry in self.source.entries if entry.name in kernels}
        self.row_axes = {entry.name: 1 for entry in self.source.entries if entry.key in tied}
        if self.block_shape is not None:
            self._check_blocks(*as_block_shape(self.block_shape))

    def view_of(self, tensor: str, array: NDArray[np.generic]) -> MatrixView:
        """Return the matrix view of one of its tensors, as it is cut."""
        shape = self.block_shape or (self.cuts or {}).get(tensor)
        return MatrixView.of(array, shape, self.row_axes.get(tensor))

    def axes_of(self, entry: TensorEntry) -> int:
        """Return how many of a tensor's first axes are the rows of its matrix view."""
        return self.row_axes.get(entry.name) or row_axes(entry.shape)

    def read(self, tensor: str) -> MatrixView:
        """Return the matrix view of one of its tensors, as the source has it."""
        return self.view_of(tensor, self.source.read(tensor))

    @property
    def address(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    def check_unchanged(self, tensor: str, digests: bytes) -> None:
        """Raise ConflictError for a tensor that is not what it was when it was read first.

        An add that others are in the way of reads its source again, after ``evaluate`` ran.
        """
        if self._first_read.setdefault(tensor, digests) != digests:
            raise ConflictError(
                f"{tensor!r} of the source of {self.address} changed while it was being added: "
                "evaluate and finetune must work on a copy of it, or put back what was there"
            )

    def renumber(self, adapter: Adapter) -> bool:
        """Take the next version if it is one that nobody asked for, and others took it."""
        if not self.is_numbered:
            return False
        taken = Taken.of(adapter, self.name)
        if self.version not in taken.versions | taken.aliases:
            return False
        self.version = taken.next_number()
        return True

    @property
    def logical_bytes(self) -> int:
        """Bytes of all tensors; tied ones count as often as they are named."""
        return sum(entry.nbytes for entry in self.source.entries)

    def distinct_entries(self) -> Iterator[tuple[TensorEntry, TensorEntry | None]]:
        """Yield the tensors, each with the earlier one that it is tied to, if any.

        Tied weights are the same memory, so the same blocks.
        """
        first: dict[object, TensorEntry] = {}
        for entry in self.source.entries:
            twin = first.get(entry.key)
            if twin is not None and twin.shape == entry.shape:
                yield entry, twin
            else:
                first[entry.key] = entry
                yield entry, None

    def _check_blocks(self, height: int, width: int) -> None:
        """Refuse blocks that no page holds as they are, which budgets of memory rest on."""
        for entry in self.source.entries:
            rows, cols = matrix_shape(entry.shape, self.row_axes.get(entry.name))
            nbytes = min(rows, height) * min(cols, width) * entry.dtype.itemsize
            if nbytes > MOST_BLOCK_BYTES:
                raise ArgumentError(
                    f"block_shape ({height}, {width}) is too large for {entry.name!r} of shape "
                    f"{entry.shape}: a block takes {nbytes:,} bytes, and a page holds "
                    f"{MOST_BLOCK_BYTES:,}; give fewer rows or columns"
                )

    def metadata_json(self) -> str:
        """Return the metadata as canonical JSON."""
        said = f"metadata of {self.address} is not JSON"
        try:
            text = json.dumps(
                dict(self.metadata), sort_keys=True, ensure_ascii=False, allow_nan=False
            )
            text.encode()  # not of half a character
        except (TypeError, ValueError, RecursionError) as exc:
            raise ArgumentError(f"{said}: {exc}") from exc
        _refuse_deep(said, text)
        return text


@dataclass(frozen=True, slots=True)
class Taken:
    """The versions and aliases that a model has."""

    versions: frozenset[str]
    aliases: frozenset[str]

    @classmethod
    def of(cls, adapter: Adapter, name: str) -> Self:
        """Return those of a model, which need not be there."""
        aliases = frozenset(alias for _, alias, _ in adapter.aliases(name))
        return cls(frozenset(taken_versions(adapter, name)), aliases)

    def next_number(self) -> str:
        """Return the first whole number after all versions that no alias is."""
        highest = max((int(v) for v in self.versions if v.isascii() and v.isdigit()), default=0)
        return next(v for v in map(str, itertools.count(highest + 1)) if v not in self.aliases)


def plan_address(
    taken: Callable[[str], Taken], text: str, version: str | None
) -> tuple[str, str, bool]:
    """Return the name and version that an add of ``text`` means, and check that they are free.

    ``taken`` is asked for each address; who adds many versions of one model remembers its answers.

    Without a version it is the next whole number after the highest one in use that no alias is, and
    the third value is true.

    Raises
    ------
    ArgumentError
        For a bad name, two different versions, or a version that an alias already has.
    DuplicateError
        When the store has this name and version.
    """
    address = parse_address(text)
    if version is not None:
        check_name(version, "version")
        if address.selector not in (None, version):
            raise ArgumentError(
                f"{text!r} names version {address.selector!r} but version={version!r} was given"
            )
    wanted = version or address.selector
    is_numbered = wanted is None
    used = taken(address.name)
    if wanted is None:
        wanted = used.next_number()
    if wanted in used.versions:
        raise DuplicateError(
            f"{address.name}@{wanted} is in the store already; "
            "add another version or remove it first"
        )
    if wanted in used.aliases:
        raise ArgumentError(
            f"{wanted!r} is an alias of {address.name}, and a version cannot have the same name; "
            "choose another version, or remove the alias first"
        )
    return address.name, wanted, is_numbered


def _check_policy(policy: Policy) -> None:
    """Refuse what is no policy, and one of a user's own that cannot be kept."""
    given_as: object = policy
    if isinstance(given_as, type) or not all(hasattr(given_as, part) for part in _POLICY):
        raise ArgumentError(
            f"{policy!r} is no policy; give one of pydedup.policies, such as Exact(), "
            "Lossless() or Bounded(0.001)"
        )
    name: object = policy.name
    if not isinstance(name, str) or not isinstance(policy, _OURS.get(name, object)):
        raise ArgumentError(
            f"the name of {policy!r} is {name!r}; it must be text, and none of {', '.join(_OURS)}"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"the name of {policy!r}, {name!r}, is no valid Unicode text") from None
    if not number(f"max_rel_error of {policy!r}", policy.max_rel_error) >= 0:
        raise ArgumentError(f"max_rel_error of {policy!r} must be 0 or more")
    parameters: object = policy.parameters()
    if not isinstance(parameters, Mapping) or not set(MEASURED).isdisjoint(parameters):
        raise ArgumentError(
            f"parameters() of {policy!r} must be a mapping without the names that certificates "
            f"have anyway ({', '.join(MEASURED)}), not {parameters!r:.100}"
        )
    said = f"parameters() of {policy!r} are not JSON"
    try:
        text = json.dumps(dict(parameters), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise ArgumentError(f"{said}: {exc}") from exc
    _refuse_deep(said, text)


def _refuse_deep(said: str, text: str) -> None:
    """Raise ArgumentError for JSON that not each Python reads."""
    opened = itertools.accumulate(
        1 if mark in "[{" else -1 for mark in _BRACKETS.findall(text) if len(mark) == 1
    )
    if max(opened, default=0) > _DEEPEST:
        raise ArgumentError(f"{said} that each Python reads: it is more than {_DEEPEST} deep")
