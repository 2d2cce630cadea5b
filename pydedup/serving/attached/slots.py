# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a torch module have their values in a store.

Names are those of ``state_dict()``; a buffer that is not part of it (positions, rotary tables) is
looked for by its path and stays as it is where the store does not have it, or has the same.
Deliberately not here: whether a stored model fits (:mod:`pydedup.serving.attached.fit`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pydedup.errors import ArgumentError
from pydedup.text import listed

__all__ = ["COUNTER", "Slot", "find_slots", "name_in_tree", "named_modules", "tensors"]

#: What norms count in training, and need for nothing else.
COUNTER = "num_batches_tracked"
#: Kinds of tensors that are known to be nothing but their elements.
_PLAIN = (torch.Tensor, nn.Parameter)
#: Where a module has what it registers, and what a recurrent one renews when a parameter is set.
_PLACES, _RENEWED = ("_parameters", "_buffers", "_modules"), ("_flat_weights",)


@dataclass(slots=True)
class Slot:
    """One tensor of a module, or several that are tied: one tensor with several names.

    Attributes
    ----------
    names
        In the state dict, or of a buffer outside of it its path. At least one must be stored.
    shape, dtype
        As in the module; the dtype is that of results, whatever is stored.
    is_parameter, requires_grad
        What detaching restores.
    places
        (path of the module, attribute): where the tensor stands. Paths, since a reference to the
        module would make a circle.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool
    requires_grad: bool
    places: list[tuple[str, str]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements in the module's dtype."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def find_slots(
    module: nn.Module,
    stored: Container[str],
    prefix: str,
    holds: Callable[[str, torch.Tensor], bool],
) -> tuple[list[Slot], dict[str, torch.Tensor]]:
    """Return what is to be taken from a store that has tensors of these names, and what stays.

    What stays are buffers outside of the state dict that the store has not, or with the very values
    of the module, which ``holds`` tells; and counters that it has not. By their names in the store.

    Raises ArgumentError when the module has a tensor that cannot be replaced (quantised, not
    initialised, on a device, in a list of its own as well), or a buffer without elements that the
    store does not have.
    """
    names = _state_names(module)
    slots: dict[int, Slot] = {}
    kept: dict[str, torch.Tensor] = {}
    empty = []
    for path, attribute, tensor in tensors(module):
        full = f"{path}.{attribute}" if path else attribute
        own = tuple(names.get(id(tensor), ()))
        optional = not own or attribute == COUNTER
        if isinstance(tensor, nn.Parameter) and not own:
            raise ArgumentError(
                f"parameter {full!r} of {_kind(module)} is not in its state_dict(), so that its "
                "name in the store is not known"
            )
        if optional and not any(prefix + name in stored for name in own or (full,)):
            if tensor.is_meta:
                empty.append(full)
            kept[prefix + full] = tensor
            continue
        if not own and not tensor.is_meta and holds(prefix + full, tensor):
            kept[prefix + full] = tensor
            continue
        _check(tensor, full)
        slot = slots.get(id(tensor))
        if slot is None:
            slot = slots[id(tensor)] = Slot(
                own or (full,),
                tuple(tensor.shape),
                tensor.dtype,
                isinstance(tensor, nn.Parameter),
                tensor.requires_grad,
            )
        slot.places.append((path, attribute))
    if empty:
        raise ArgumentError(
            f"buffers of {_kind(module)} have no values, being on the meta device, and are not in "
            f"the store: {listed(empty)}; assign them before attaching, or build the module "
            "outside of torch.device('meta')"
        )
    _refuse_others(module, slots)
    return list(slots.values()), kept


def named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules of a tree with their paths, each once, in the order of torch.

    Torch's own tells them apart by their hash and ``__eq__``, which a class may have changed.
    """
    seen: set[int] = set()
    left: list[tuple[str, nn.Module | None]] = [("", module)]
    while left:
        path, one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield path, one
        before = f"{path}." if path else ""
        left += [(before + name, part) for name, part in reversed(one._modules.items())]


def name_in_tree(path: str) -> str:
    """Return what messages call a module of a tree."""
    return f"{path!r} in the module" if path else "the module"


def _state_names(module: nn.Module) -> dict[int, list[str]]:
    """Return the names in the state dict by the identity of the tensor."""
    names: dict[int, list[str]] = {}
    present = {id(tensor) for _, _, tensor in tensors(module)}
    for name, value in module.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] == "_extra_state":
            continue
        if not isinstance(value, torch.Tensor) or id(value) not in present:
            raise ArgumentError(
                f"{name!r} in the state_dict() of {_kind(module)} is no tensor of a module but a "
                f"{type(value).__name__} made for it (as in quantised modules); attach the plain "
                "module"
            )
        names.setdefault(id(value), []).append(name)
    return names


def tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (path of the module, attribute, tensor) of all parameters and buffers."""
    for path, owner in named_modules(module) if recurse else [("", module)]:
        for own in (owner._parameters, owner._buffers):
            for attribute, tensor in own.items():
                if tensor is not None:
                    yield path, attribute, tensor


def _check(tensor: torch.Tensor, name: str) -> None:
    if nn.parameter.is_lazy(tensor):
        raise ArgumentError(
            f"{name!r} has no shape before the module is called; call it once, or build it with "
            "sizes, and then attach it"
        )
    if type(tensor) not in _PLAIN or tensor.layout != torch.strided or tensor.is_quantized:
        raise ArgumentError(
            f"{name!r} is a {type(tensor).__name__} of layout {tensor.layout}; only plain dense "
            "tensors can be attached"
        )
    if tensor.device.type not in ("cpu", "meta"):
        raise ArgumentError(
            f"{name!r} is on {tensor.device}; weights are streamed on the CPU: move the module "
            "there with .to('cpu'), or build it on the meta device"
        )


def _refuse_others(module: nn.Module, slots: Mapping[int, Slot]) -> None:
    """Raise ArgumentError where a module keeps a tensor in another place as well.

    There it would stay what it is, and the module would compute with it.
    """
    for path, inner in named_modules(module):
        for attribute, value in vars(inner).items():
            if attribute in (*_PLACES, *(_RENEWED if isinstance(inner, nn.RNNBase) else ())):
                continue
            slot = next((slots[id(one)] for one in _inside(value, set()) if id(one) in slots), None)
            if slot is not None:
                full = f"{path}.{attribute}" if path else attribute
                raise ArgumentError(
                    f"{_kind(module)} keeps {slot.names[0]!r} in {full!r} as well, where it would "
                    "stay what it is now: delete that attribute before attaching, or have the "
                    "module use the parameter itself"
                )


def _inside(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value of builtin containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, functools.partial):
        yield from _inside(value.args, seen)
        yield from _inside(value.keywords, seen)
    elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
        seen.add(id(value))
        for one in list(value.values() if isinstance(value, dict) else value):
            yield from _inside(one, seen)


def _kind(module: nn.Module) -> str:
    return type(module).__name__
