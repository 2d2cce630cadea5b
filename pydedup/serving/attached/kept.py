# SPDX-License-Identifier: Apache-2.0
"""Buffers outside of the state dict that stay as the module has them.

Some files have them and others, of the same model, do not (positions, in those of transformers
before version 4.31). A module that has the same itself takes both, one version after the other.
"""

from __future__ import annotations

import numpy as np
import torch

from pydedup.catalog import StoredModel
from pydedup.formats.torch_tensors import to_torch
from pydedup.pool import PagePool
from pydedup.serving.tensor import stored_tensor

__all__ = ["holds"]


def holds(model: StoredModel, pool: PagePool, name: str, own: torch.Tensor) -> bool:
    """Return whether a tensor of the model is the same as this one, number by number."""
    if not own.is_cpu or own.layout is not torch.strided or own.is_quantized:
        return False
    stored = stored_tensor(model, name, pool)
    kind = to_torch(np.empty(0, stored.dtype.numpy)).dtype
    if stored.shape != tuple(own.shape) or kind is not own.dtype:
        return False  # without reading it
    return torch.equal(to_torch(stored.numpy()), own)
