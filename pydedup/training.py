# SPDX-License-Identifier: Apache-2.0
"""What the `Accuracy` policy asks of a user, made from a torch module.

`torch_evaluate`, `torch_saliency` and `torch_finetune` put the arrays they are given into the
module, let the user's function work on it, and leave the module as they found it: weights, buffers
and training flags. They are re-exported by `pydedup.policies`. torch is imported when they are
called. Not here: the search (``ingest/accuracy.py``), or anything that knows a store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pydedup.accuracy import Arrays
from pydedup.arguments import as_count
from pydedup.errors import ArgumentError, EvaluationError

if TYPE_CHECKING:
    import torch

__all__ = ["torch_evaluate", "torch_finetune", "torch_saliency"]


def torch_evaluate(
    module: torch.nn.Module, fn: Callable[[torch.nn.Module], Any]
) -> Callable[[Arrays], Any]:
    """Return an ``evaluate`` for `Accuracy` that runs ``fn`` on the module with other weights.

    Parameters
    ----------
    module
        Its ``state_dict`` has the names of the stored tensors. It is in eval mode while ``fn``
        runs, without gradients, and afterwards what it was before.
    fn
        Maps the module to a number, or to one score per validation example (a 1-D tensor, array
        or list); higher is better.

    Raises
    ------
    EvaluationError
        From what is returned, when ``fn`` puts the module, or a part of it, into training mode:
        dropout and batch statistics would make the metric depend on chance.
    ArgumentError
        From what is returned, when the arrays' names, shapes or types are not the module's.
    """

    def evaluate(weights: Arrays) -> Any:
        import torch

        with _holding(module, weights), _guarded(module), torch.no_grad():
            module.eval()
            result = fn(module)
            _refuse_training(module)
        if isinstance(result, torch.Tensor):
            result = result.detach().to("cpu", torch.float64).numpy()
        return result

    return evaluate


def torch_saliency(
    module: torch.nn.Module, loss: Callable[[torch.nn.Module], torch.Tensor]
) -> Callable[[Arrays], dict[str, NDArray[np.float32]]]:
    """Return a ``saliency`` for `Accuracy`: abs(gradient * weight) of each tensor.

    Parameters
    ----------
    module
        As for `torch_evaluate`.
    loss
        Maps the module to a scalar loss over some examples. With ``confidence`` they must not be
        the validation examples.
    """

    def saliency(weights: Arrays) -> dict[str, NDArray[np.float32]]:
        import torch

        with _holding(module, weights), _differentiable(module), torch.enable_grad():
            module.eval()
            state = module.state_dict(keep_vars=True)
            asked = {name: state[name] for name in weights if state[name].requires_grad}
            found = torch.autograd.grad(loss(module), list(asked.values()), allow_unused=True)
            # What has no gradient (buffers, unused weights) changes the loss by nothing.
            result = {name: np.zeros(array.shape, np.float32) for name, array in weights.items()}
            for (name, tensor), gradient in zip(asked.items(), found, strict=True):
                if gradient is not None:
                    salient = (gradient.to_dense().float() * tensor.detach().float()).abs()
                    result[name] = salient.to("cpu", torch.float32).numpy()
        return result

    return saliency


def torch_finetune(
    module: torch.nn.Module, step: Callable[[torch.nn.Module, int], Any], *, steps: int
) -> Callable[[Arrays, Arrays], dict[str, NDArray[Any]]]:
    """Return a ``finetune`` for `Accuracy` that trains what is not shared.

    Parameters
    ----------
    module
        As for `torch_evaluate`; it is in training mode when a step begins.
    step
        Called with the module and the number of the step; takes one training step, whatever the
        optimiser. It must see the module's own parameters, so make the optimiser from them; it
        starts from the state that it has then.
    steps
        How many steps to take. After each one, frozen elements get back the bits they had.

    Raises
    ------
    ArgumentError
        When ``steps`` is no whole number above 0.
    """
    count = as_count("steps", steps, least=1)

    def finetune(weights: Arrays, frozen: Arrays) -> dict[str, NDArray[Any]]:
        import torch

        from pydedup.formats.torch_tensors import to_numpy

        with _holding(module, weights) as state, torch.enable_grad():
            kept = [
                (state[name], torch.from_numpy(np.array(mask)), state[name].detach().clone())
                for name, mask in frozen.items()
                if mask.any()
            ]
            for number in range(count):
                module.train()
                step(module, number)
                with torch.no_grad():
                    for tensor, mask, before in kept:
                        tensor.copy_(torch.where(mask.to(tensor.device), before, tensor))
            return {name: to_numpy(state[name]).copy() for name in weights}

    return finetune


@contextmanager
def _holding(module: torch.nn.Module, weights: Arrays) -> Iterator[dict[str, torch.Tensor]]:
    """Put the arrays into the module; afterwards it has its weights and flags again."""
    import torch

    state: dict[str, torch.Tensor] = module.state_dict()
    given = {name: _to_torch(name, array, state) for name, array in weights.items()}
    modes = [(part, part.training) for part in module.modules()]
    # All of it, since a forward pass may change buffers that are not in the store, nor in the
    # state dict. `half` and `to` put other memory, or other buffers, into their places.
    places = [
        (part, name, tensor)
        for part, _ in modes
        for found in (part.named_parameters, part.named_buffers)
        for name, tensor in found(recurse=False, remove_duplicate=False)
    ]
    held = [tensor for _, _, tensor in places]
    known = {tensor.data_ptr() for tensor in held}
    # What a module makes its state of by itself need be neither.
    held += [
        tensor for name, tensor in state.items() if name in given and tensor.data_ptr() not in known
    ]
    before = {id(t): (t, t.data, t.detach().clone()) for t in held}
    try:
        with torch.no_grad():
            for name, tensor in given.items():
                state[name].copy_(tensor)
        yield state
    finally:
        with torch.no_grad():
            for tensor, memory, values in before.values():
                tensor.data = memory
                tensor.copy_(values)
        for part, name, tensor in places:
            if getattr(part, name) is not tensor:
                setattr(part, name, tensor)
        for part, mode in modes:
            part.training = mode


@contextmanager
def _differentiable(module: torch.nn.Module) -> Iterator[None]:
    """Give parameters that are not trained a gradient, too; they matter for the loss as well."""
    frozen = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _guarded(module: torch.nn.Module) -> Iterator[None]:
    """Refuse forward passes in training mode, also of a part of the module."""
    hooks = [
        part.register_forward_pre_hook(lambda _part, _inputs: _refuse_training(module))
        for part in (module, *module.children())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_training(module: torch.nn.Module) -> None:
    for name, part in module.named_modules():
        if part.training:
            raise EvaluationError(
                f"{name or 'the module'} ({type(part).__name__}) was put into training mode while "
                "it was evaluated; dropout and batch statistics would make the metric depend on "
                "chance: call eval(), or leave the mode alone"
            )


def _to_torch(name: str, array: NDArray[Any], state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    from pydedup.formats.torch_tensors import to_torch

    if name not in state:
        raise ArgumentError(
            f"the module has no tensor {name!r}; its state_dict must have the names of the model"
        )
    # A copy, since torch writes through arrays that numpy calls read-only.
    tensor = to_torch(np.array(array))
    there = state[name]
    if tensor.dtype != there.dtype or tensor.shape != there.shape:
        raise ArgumentError(
            f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}, but the module has "
            f"{there.dtype} {tuple(there.shape)}"
        )
    return tensor
