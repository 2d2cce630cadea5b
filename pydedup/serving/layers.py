# SPDX-License-Identifier: Apache-2.0
"""Torch modules whose weights stay in a store.

`attach` puts tensors without elements where the parameters of a module were
(:mod:`pydedup.serving.attached`); torch's functions, given one of these, stream the weights from
the store. The module's own code runs unchanged, so any module can be attached. Deliberately not
here: predictions without torch (:mod:`pydedup.serving.engine`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pydedup._memory import give_back_freed
from pydedup.catalog import Catalog
from pydedup.errors import ArgumentError
from pydedup.pool import PagePool
from pydedup.serving.attached import (  # noqa: F401  (they register)
    experts,
    functions,
    norms,
    recurrent,
    views,
)
from pydedup.serving.attached.modules import attachment_of, enclose, release
from pydedup.serving.attached.parameter import StoredParameter
from pydedup.serving.attached.slots import name_in_tree, named_modules, tensors
from pydedup.serving.attached.weights import Attachment
from pydedup.text import listed

__all__ = ["attach", "detach"]


def attach(
    module: nn.Module,
    address: str,
    catalog: Catalog,
    pool: PagePool,
    epoch: Callable[[], int],
    prefix: str = "",
) -> None:
    """Make a module compute with the weights of a stored model, and free its own.

    Parameters
    ----------
    module
        In eval mode, on the CPU or the meta device. Left as it is when this fails.
    address
        What is attached; it is looked up for each call of the module.
    catalog, pool, epoch
        The store's.
    prefix
        What the names in the store have before those of the module.

    Raises
    ------
    ArgumentError
        When the module is in training mode, attached already, or has tensors that the store has not
        or in another shape; the message lists them.
    NotFoundError
        When there is no such model.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"attach takes a torch.nn.Module, not {type(module).__name__}")
    if not isinstance(prefix, str):
        raise ArgumentError(f"prefix must be a text, such as 'bert.', not {prefix!r}")
    for path, inner in named_modules(module):
        before = attachment_of(inner)
        if before is not None:
            raise ArgumentError(
                f"{name_in_tree(path)} is attached to {before.address} already; detach it first"
            )
        if isinstance(inner, torch.jit.ScriptModule):
            raise ArgumentError(
                f"{name_in_tree(path)} is TorchScript, whose code is not Python's; attach the "
                "module that it was made from"
            )
    training = [path or "the module itself" for path, m in named_modules(module) if m.training]
    if training:
        raise ArgumentError(
            f"attached modules only predict; this one is in training mode ({listed(training)}): "
            "call module.eval() first"
        )

    attachment = Attachment(module, address, catalog, pool, epoch, prefix)
    enclose(module, attachment)
    for number, slot in enumerate(attachment.slots):
        stored = StoredParameter(attachment, number)
        for path, attribute in slot.places:
            _put(module.get_submodule(path), attribute, stored, slot.is_parameter)
    give_back_freed()


def detach(module: nn.Module, catalog: Catalog) -> None:
    """Make an attached module a plain one again, with the weights that its address has now.

    Raises ArgumentError when the module is not attached, to this store, as a whole, has a part
    whose class was made of the attached one, or does not fit the version that its address means.
    """
    attachment = attachment_of(module)
    if attachment is None or attachment.root() is not module:
        raise ArgumentError(
            f"this {type(module).__name__} is not attached; detach takes what attach was given"
        )
    if attachment.catalog is not catalog:
        raise ArgumentError(f"the module is attached to {attachment.address} of another store")
    places = [
        (path, attribute, stored)
        for path, attribute, stored in tensors(module)  # else somebody has replaced it
        if type(stored) is StoredParameter and stored.attachment is attachment
    ]
    weights = attachment.resolve()
    loaded: dict[int, torch.Tensor] = {}
    with torch.inference_mode(False):  # tensors made in it could not be trained
        for number in {stored.number for *_, stored in places}:  # all, before anything is changed
            slot = attachment.slots[number]
            tensor = weights.read(number)
            loaded[number] = (
                nn.Parameter(tensor, slot.requires_grad)
                if slot.is_parameter
                else tensor.requires_grad_(slot.requires_grad)
            )
    release(module)
    for path, attribute, stored in places:
        tensor, is_parameter = loaded[stored.number], stored.slot.is_parameter
        _put(module.get_submodule(path), attribute, tensor, is_parameter)


def _put(owner: nn.Module, attribute: str, tensor: torch.Tensor, is_parameter: bool) -> None:
    if isinstance(owner, nn.RNNBase):  # keeps a list of its parameters beside them
        setattr(owner, attribute, tensor)
    elif is_parameter:
        owner._parameters[attribute] = tensor  # type: ignore[assignment]
    else:
        owner._buffers[attribute] = tensor
