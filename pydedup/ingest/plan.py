# SPDX-License-Identifier: Apache-2.0
"""What is to be added: named, opened and checked before a single byte is hashed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydedup.adapter import Adapter
from pydedup.errors import ArgumentError, DuplicateError
from pydedup.formats.base import ModelSource
from pydedup.graph import Graph
from pydedup.names import check_name, parse_address
from pydedup.policies import Policy

__all__ = ["Request", "plan_address"]

#: What all policies have, those of users too (`pydedup.policies.Policy`).
_POLICY = ("name", "compresses", "uses_deltas", "max_rel_error", "parameters")


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

    def __post_init__(self) -> None:
        """Refuse what is no policy, graph or metadata; raises ArgumentError."""
        policy: object = self.policy
        if isinstance(policy, type) or not all(hasattr(policy, part) for part in _POLICY):
            raise ArgumentError(
                f"{policy!r} is no policy; give one of pydedup.policies, such as Exact(), "
                "Lossless() or Bounded(0.001)"
            )
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

    @property
    def address(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def logical_bytes(self) -> int:
        """Bytes of all tensors; tied ones count as often as they are named."""
        return sum(_size(entry.shape) * entry.dtype.itemsize for entry in self.source.entries)

    def metadata_json(self) -> str:
        """Return the metadata as canonical JSON."""
        try:
            return json.dumps(
                dict(self.metadata), sort_keys=True, ensure_ascii=False, allow_nan=False
            )
        except (TypeError, ValueError) as exc:
            raise ArgumentError(f"metadata of {self.address} is not JSON: {exc}") from exc


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def plan_address(adapter: Adapter, text: str, version: str | None) -> tuple[str, str]:
    """Return the (name, version) that an add of ``text`` means, and check that it is free.

    Without a version it is the next whole number after the highest one in use.

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
    taken = {row.version for row in adapter.models(name=address.name)}
    if wanted is None:
        numbers = [int(v) for v in taken if v.isascii() and v.isdigit()]
        wanted = str(max(numbers, default=0) + 1)
    if wanted in taken:
        raise DuplicateError(
            f"{address.name}@{wanted} is in the store already; "
            "add another version or remove it first"
        )
    for _, alias, _ in adapter.aliases(address.name):
        if alias == wanted:
            raise ArgumentError(
                f"{wanted!r} is an alias of {address.name}; a version cannot have the same name"
            )
    return address.name, wanted
