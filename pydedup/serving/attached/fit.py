# SPDX-License-Identifier: Apache-2.0
"""Whether a stored model fits a torch module, and what to do where it does not.

Some files have buffers outside of the state dict and others, of the same model, do not (positions,
in those of transformers before version 4.31). A module that has the same itself keeps its own, and
takes both, one version after the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pydedup.catalog import StoredModel
from pydedup.errors import ArgumentError
from pydedup.formats.torch_tensors import to_torch
from pydedup.pool import PagePool
from pydedup.serving.attached.slots import COUNTER, Slot
from pydedup.serving.tensor import stored_tensor
from pydedup.text import listed

__all__ = ["fit", "holds"]

# Of one expert, as files name its weights, and of all of a layer, as modules do.
_EXPERT, _EXPERTS = re.compile(r"(^|\.)experts\.\d+\."), re.compile(r"(^|\.)experts\.[a-z]")


def fit(
    model: StoredModel,
    pool: PagePool,
    slots: Sequence[Slot],
    kept: Mapping[str, torch.Tensor],
    prefix: str,
    kind: str,
) -> list[str]:
    """Return the stored name of each slot, empty for a counter that this version has not.

    Raises ArgumentError that lists all that differs.
    """
    stored = {info.name: info for info in model.tensors}
    chosen, missing, differ = [], [], []
    known: set[str] = set()
    for slot in slots:
        names = [prefix + name for name in slot.names]
        known.update(names)
        present = [name for name in names if name in stored]
        if not present:
            if names[0].rpartition(".")[2] != COUNTER:
                missing.append(" = ".join(names))
            chosen.append("")
            continue
        chosen.append(present[0])
        for name in present:
            info = stored[name]
            if info.shape != slot.shape:
                differ.append(f"{name} has shape {info.shape}, not {slot.shape}")
            elif info.dtype.is_float != slot.dtype.is_floating_point:
                differ.append(f"{name} is {info.dtype.label}, not {slot.dtype}")
        if not differ and not _are_one(model, present):
            differ.append(f"{listed(present)} are one tensor in the module, and not here")
    for name in stored.keys() & kept.keys():
        known.add(name)
        is_counter = name.rpartition(".")[2] == COUNTER
        if not is_counter and not holds(model, pool, name, kept[name]):
            differ.append(f"{name} is not what the module has there: attach a new one")
    # What `get_extra_state` gave is no weight: the module keeps its own, as where it is no tensor.
    known.update(name for name in stored if name.rpartition(".")[2] == "_extra_state")
    unexpected = [name for name in stored if name.startswith(prefix) and name not in known]
    problems = [
        f"{what}: {listed(names)}"
        for what, names in (
            ("missing in the store", missing),
            ("not in the module", unexpected),
            ("different", differ),
        )
        if names
    ]
    if problems:
        below = {name.removeprefix(prefix) for name in stored if name.startswith(prefix)}
        hint = _prefix_hint([slot.names[0] for slot in slots], below, prefix)
        hint = hint or _form_hint(missing, unexpected)
        if not unexpected and not differ:
            hint = hint or _tie_hint(slots, below)
        raise ArgumentError(f"{model.address} does not fit {kind}: {'; '.join(problems)}{hint}")
    return chosen


def _form_hint(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Return what to do where a module has another form than the model that was added."""
    if any(map(_EXPERT.search, unexpected)) and any(map(_EXPERTS.search, missing)):
        what = (
            "the module has the experts of a layer in one tensor, and the file that was added has "
            "each by itself"
        )
    elif any(".base_layer." in name for name in missing):
        what = "the module has adapters of peft, and the model that was added has none"
    else:
        return ""
    return f"; {what}: add the module, store.add(name, module), which shares its blocks with that"


def _tie_hint(slots: Sequence[Slot], stored: set[str]) -> str:
    """Return what to do where each tensor that is missing may be tied to one that is there."""
    missing = {slot.shape for slot in slots if stored.isdisjoint(slot.names)}
    if not missing <= {slot.shape for slot in slots if not stored.isdisjoint(slot.names)}:
        return ""
    return (
        "; where the model has one tensor for two names, tie them in the module first "
        "(in transformers module.tie_weights())"
    )


def _prefix_hint(wanted: Sequence[str], stored: set[str], prefix: str) -> str:
    """Return what to do where a prefix is all that names differ by, as wrappers give them one."""
    for name in sorted(stored) if wanted else ():
        before = name.removesuffix(wanted[0])
        if before.endswith(".") and stored == {before + one for one in wanted}:
            return (
                f"; the names in the store begin with {before!r}: give prefix={prefix + before!r}"
            )
        before = wanted[0].removesuffix(name)
        if before.endswith(".") and {before + one for one in stored} == set(wanted):
            part = before.removesuffix(".")
            return f"; the names in the module begin with {before!r}: attach its {part!r} instead"
    return ""


def _are_one(model: StoredModel, names: Sequence[str]) -> bool:
    """Return whether tensors that a module has tied are the same blocks."""
    first, *others = (model.block_map(name) for name in names)
    return all(
        np.array_equal(first.page_ids, other.page_ids) and np.array_equal(first.slots, other.slots)
        for other in others
    )


def holds(model: StoredModel, pool: PagePool, name: str, own: torch.Tensor) -> bool:
    """Return whether a tensor of the model is the same as this one, number by number."""
    if not own.is_cpu or own.layout is not torch.strided or own.is_quantized:
        return False
    stored = stored_tensor(model, name, pool)
    kind = to_torch(np.empty(0, stored.dtype.numpy)).dtype
    if stored.shape != tuple(own.shape) or kind is not own.dtype:
        return False  # without reading it
    return torch.equal(to_torch(stored.numpy()), own)
