# SPDX-License-Identifier: Apache-2.0
"""Norms with running statistics, which they update in training: statistics in a store stay.

All else of a norm is loaded, as for any function of torch that has no handler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from pydedup.errors import ArgumentError
from pydedup.serving.attached.parameter import StoredParameter, handles

__all__: list[str] = []


@handles(functional.batch_norm)
def _batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    _refuse_update(running_mean, training)
    return NotImplemented


@handles(functional.instance_norm)
def _instance_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    _refuse_update(running_mean, use_input_stats)
    if not isinstance(running_mean, StoredParameter) or not isinstance(running_var, torch.Tensor):
        return NotImplemented
    # torch before 2.11 writes statistics that it only reads back to where they are
    mean, var = running_mean.clone(), running_var.clone()
    return functional.instance_norm(input, mean, var, weight, bias, use_input_stats, momentum, eps)


def _refuse_update(running_mean: torch.Tensor | None, training: bool) -> None:
    if training and isinstance(running_mean, StoredParameter):
        raise ArgumentError(
            f"{running_mean.label} cannot be updated: the module is in training mode; call eval()"
        )
