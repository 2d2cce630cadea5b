# SPDX-License-Identifier: Apache-2.0
"""The guarantees that a user can pick for a model (docs/architecture.md, "Policies")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pydedup.accuracy import Accuracy, number
from pydedup.errors import ArgumentError
from pydedup.training import torch_evaluate, torch_finetune, torch_saliency

__all__ = [
    "Accuracy",
    "Bounded",
    "Exact",
    "Lossless",
    "Policy",
    "torch_evaluate",
    "torch_finetune",
    "torch_saliency",
]


class Policy(Protocol):
    """What a user gets back, and how blocks may be stored to keep it."""

    @property
    def name(self) -> str:
        """The name that is recorded with a model."""

    @property
    def compresses(self) -> bool:
        """Whether a block may be stored plane-compressed."""

    @property
    def uses_deltas(self) -> bool:
        """Whether a block may be stored as a delta on a similar one."""

    @property
    def max_rel_error(self) -> float:
        """Greatest relative L2 difference of a block to what is stored for it; 0: the same bits."""

    def parameters(self) -> Mapping[str, Any]:
        """Return what the certificate says of the policy beside its name, in JSON's types."""


@dataclass(frozen=True, slots=True)
class Exact:
    """The same bits; identical blocks are shared, all others stored raw: the fastest to serve."""

    name = "exact"
    compresses = False
    uses_deltas = False
    max_rel_error = 0.0

    def parameters(self) -> Mapping[str, Any]:
        """Return nothing: there is nothing to choose."""
        return {}


@dataclass(frozen=True, slots=True)
class Lossless:
    """The same bits (the default): shared, a delta on a similar block, compressed, or raw.

    Whichever is smallest, where it saves at least 5 % of a block.
    """

    name = "lossless"
    compresses = True
    uses_deltas = True
    max_rel_error = 0.0

    def parameters(self) -> Mapping[str, Any]:
        """Return nothing: there is nothing to choose."""
        return {}


@dataclass(frozen=True, slots=True)
class Bounded:
    """Each block of floats within a relative error: shared, else a quantised delta, else the bits.

    What is stored for a block v differs from it by at most ``max_rel_error * |v|`` (Euclidean
    norms), which is checked for each block. A block with a NaN or an infinity, of fewer than 1,024
    elements, or of another dtype than f64, f32, f16 and bf16 keeps its bits. Elements that are 0
    stay 0 in a quantised delta.

    Attributes
    ----------
    max_rel_error
        Above 0 and below 1, e.g. ``0.001``.

    Raises
    ------
    ArgumentError
        For a bound outside of that range.
    """

    name = "bounded"
    compresses = True
    uses_deltas = True

    max_rel_error: float

    def __post_init__(self) -> None:
        bound = number("max_rel_error", self.max_rel_error)
        if not 0 < bound < 1:
            raise ArgumentError(
                f"max_rel_error must be a number above 0 and below 1, got {self.max_rel_error!r}"
            )
        object.__setattr__(self, "max_rel_error", bound)

    def parameters(self) -> Mapping[str, Any]:
        """Return the bound."""
        return {"max_rel_error": self.max_rel_error}
