# SPDX-License-Identifier: Apache-2.0
"""The guarantees that a user can pick for a model (docs/architecture.md, "Policies")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Exact", "Lossless", "Policy"]


class Policy(Protocol):
    """What a user gets back, and how blocks may be stored to keep it."""

    @property
    def name(self) -> str:
        """The name that is recorded with a model."""

    @property
    def compresses(self) -> bool:
        """Whether a block may be stored plane-compressed."""


@dataclass(frozen=True, slots=True)
class Exact:
    """The same bits; identical blocks are shared, all others stored raw: the fastest to serve."""

    @property
    def name(self) -> str:
        """The name that is recorded with a model."""
        return "exact"

    @property
    def compresses(self) -> bool:
        """Blocks stay raw."""
        return False


@dataclass(frozen=True, slots=True)
class Lossless:
    """The same bits (the default): shared, plane-compressed where that saves 5 %, or raw."""

    @property
    def name(self) -> str:
        """The name that is recorded with a model."""
        return "lossless"

    @property
    def compresses(self) -> bool:
        """Blocks are compressed where that saves at least 5 %."""
        return True
