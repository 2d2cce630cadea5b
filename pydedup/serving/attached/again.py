# SPDX-License-Identifier: Apache-2.0
"""Products with a stored matrix that were asked before, in a third of the steps.

Between large results of torch each step of Python waits for memory: what it reads is in no cache
any more, and a small layer takes as long as its steps do (130 us instead of 180). So all that
:mod:`pydedup.serving.attached.functions` looks at is looked at once here, and whatever is not as it
mostly is goes there.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from pydedup.serving.attached.parameter import StoredParameter, may_be_traced

__all__ = ["product_again"]


def product_again(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return x @ weight.T + bias where that was asked before, within a call of the module.

    None where it was not, or anything is not as it mostly is: `functions` then looks closer.
    """
    if type(weight) is not StoredParameter or type(x) is not torch.Tensor or not weight.is_whole:
        return None
    attachment = weight.attachment
    weights = attachment.inside.weights
    offset = None
    if bias is not None:
        if (
            type(bias) is not StoredParameter
            or bias.attachment is not attachment
            or not bias.is_whole
        ):
            return None
        offset = bias.number
    dtype = attachment.slots[weight.number].dtype
    if (
        weights is None
        or x.dtype is not dtype
        or dtype is torch.float16
        or x.requires_grad
        or may_be_traced()  # or measured
        or torch.is_autocast_enabled("cpu")
        or forward_ad._current_level >= 0
        or torch._is_functional_tensor(x)
    ):
        return None
    as_bf16 = dtype is torch.bfloat16
    try:
        if not x.is_contiguous():
            return None
        given = (x.view(torch.uint16) if as_bf16 else x).numpy()
    except (RuntimeError, TypeError):
        return None
    y = weights.again(weight.number, given, offset, as_bf16=as_bf16)
    if y is None:
        return None
    result = torch.from_numpy(y)
    return result.view(dtype) if as_bf16 else result
