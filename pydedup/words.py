# SPDX-License-Identifier: Apache-2.0
"""What arguments take that have fixed words: types by which editors complete and checkers check.

    def fetched(store: Store, dtype: FloatDType) -> dict[str, Array]: ...

The words of an alias are those that are taken when a program runs, too, and the errors name them.
Deliberately not here: what the words mean, which the functions say that take them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from pydedup.errors import ArgumentError

if TYPE_CHECKING:
    import torch

    from pydedup.types import DType

__all__ = [
    "Activation",
    "Algorithm",
    "BagMode",
    "Device",
    "FileFormat",
    "FloatDType",
    "Measure",
    "OnConflict",
    "OnError",
    "OpenMode",
    "Order",
    "Replacement",
    "ReplayPolicy",
    "Routing",
    "Search",
    "check_word",
]

#: `pydedup.open`: read and write, or read only.
OpenMode: TypeAlias = Literal["a", "r"]
#: `pydedup.open`: which page a full pool gives up; `pydedup.replacement.POLICIES` says more.
Replacement: TypeAlias = Literal["lru", "mru", "lru2", "locality", "reuse"]
#: `pydedup.replacement.replay`: the same, and the best there could be.
ReplayPolicy: TypeAlias = Literal[Replacement, "optimum"]
#: `Store.score`, `pydedup.ray.score`: what becomes of a row that cannot be predicted.
OnError: TypeAlias = Literal["fail", "skip"]
#: `Store.copy_to`: what is done about a name that is taken.
OnConflict: TypeAlias = Literal["error", "skip", "replace"]
#: `Store.export`: the formats that are written.
FileFormat: TypeAlias = Literal[
    "safetensors",
    "torch",
    "npz",
    "npy",
    "huggingface",
    "onnx",
    "keras",
    "keras-h5",
    "glove",
    "word2vec",
    "word2vec-binary",
]
#: `Store.quotas`: which bytes are limited.
Measure: TypeAlias = Literal["marginal", "logical"]
#: Products and convolutions with a stored tensor.
Activation: TypeAlias = Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"]
#: `StoredTensor.bag`: how the rows of a bag become one.
BagMode: TypeAlias = Literal["sum", "mean", "max"]
#: `pydedup.policies.Accuracy`: which blocks are tried first.
Order: TypeAlias = Literal["magnitude", "saliency"]
#: `pydedup.policies.Accuracy`: how many are tried at a time.
Search: TypeAlias = Literal["step", "bisect", "halving"]
#: `pydedup.packing.pack`.
Algorithm: TypeAlias = Literal["layout", "two_stage", "greedy1", "greedy2", "baseline"]
#: `pydedup.ray.serving.deployment`: which replica gets a request.
Routing: TypeAlias = Literal["families", "multiplexed", "any"]

_FloatName: TypeAlias = Literal[
    "f64",
    "f32",
    "f16",
    "bf16",
    "f8_e4m3",
    "f8_e5m2",
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
]
#: `Store.load`: what weights of floating point become; a label, or a dtype of numpy or torch.
FloatDType: TypeAlias = "_FloatName | DType | np.dtype[Any] | type[np.generic] | torch.dtype"
#: `Store.load_torch`: a device of torch.
Device: TypeAlias = "str | int | torch.device"


def check_word(argument: str, value: object, words: Iterable[str]) -> None:
    """Raise ArgumentError for the value of an argument that is none of its ``words``."""
    known = tuple(words)
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(f"unknown {argument} {value!r:.100}; choose one of: {', '.join(known)}")
