# SPDX-License-Identifier: Apache-2.0
"""Which weights a checkpoint holds: training scripts save them under a key, beside other things.

Several sets of weights, such as plain and averaged ones (EMA), are no one model: whoever adds them
says which. Deliberately not here: reading files (:mod:`pydedup.formats.torch`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydedup.errors import ArgumentError, FormatError, NotFoundError
from pydedup.formats.torch_tensors import is_tensor
from pydedup.text import it_has, listed

__all__ = ["Weights", "find_weights", "is_extra"]

#: Keys under which training scripts put the state dict, in the order in which they are tried.
_KEYS = (
    *("state_dict", "model_state_dict", "model", "module", "params"),
    *("net", "network", "weights"),
)
#: In keys of weights that were averaged over training, and of what is none of the model's.
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa)(?![a-z])", re.IGNORECASE)
_OTHERS = re.compile(r"optim|sched|scaler", re.IGNORECASE)
#: So many keys lead to the weights at most.
_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of one model, and the keys under which they were.

    ``left_out`` are the keys of everything else.
    """

    tensors: dict[str, Any]
    key: str | None
    left_out: tuple[str, ...]


def find_weights(
    loaded: object, where: str, wanted: str | None = None, *, every_set: bool = False
) -> Weights:
    """Return the weights of a checkpoint.

    Parameters
    ----------
    loaded
        What ``torch.load`` returned.
    where
        What messages call it.
    wanted
        The key of the weights, where there are several sets.
    every_set
        Take all of them as one instead, each name behind its key.

    Raises
    ------
    ArgumentError
        When there are several, and none is ``wanted``.
    NotFoundError
        When nothing has the key that is ``wanted``.
    FormatError
        When there is no state dict, or one with something else than tensors in it.
    """
    path: list[str] = []
    left_out: list[str] = []
    known: list[str] = []
    value = loaded
    for _ in range(_DEPTH):
        if not isinstance(value, Mapping):
            break
        sets = _sets_in(value, every=every_set)
        known += [str(key) for key, item in value.items() if isinstance(item, Mapping)]
        if wanted is not None and wanted in value:
            sets, wanted = [wanted], None
        if not sets:
            break
        if len(sets) > 1 and every_set:
            found = {key: find_weights(value[key], where, every_set=True).tensors for key in sets}
            return Weights({f"{k}.{n}": t for k in found for n, t in found[k].items()}, None, ())
        if len(sets) > 1 and wanted is None:
            raise ArgumentError(
                f"{where} holds several sets of weights, under {listed(list(map(repr, sets)))}: "
                f"say which with weights_key (--weights-key), such as {sets[0]!r}"
            )
        if len(sets) > 1:
            break
        left_out += [str(key) for key in value if key != sets[0]]
        path += sets
        value = value[sets[0]]
    if wanted is not None:
        there = it_has(wanted, known) if known else "; it is a state dict itself"
        raise NotFoundError(f"{where} has nothing under the key {wanted!r}{there}")
    key = ".".join(path) or None
    if not isinstance(value, Mapping):
        under = "" if key is None else f" under {key!r}"
        raise FormatError(
            f"{where} holds a {type(value).__name__}{under}, not a state dict; save "
            "model.state_dict()"
        )
    return Weights(_tensors(value, where, left_out), key, tuple(left_out))


def is_extra(name: str) -> bool:
    """Return whether an entry of a state dict is what ``get_extra_state`` of a module gave."""
    return name.rpartition(".")[2] == "_extra_state"


def _sets_in(value: Mapping[Any, Any], *, every: bool) -> list[str]:
    """Return the usual keys in a mapping under which there are weights; none of a state dict."""
    plain = [key for key in _KEYS if _holds_weights(value.get(key), any)]
    others = [key for key in _parts(value) if key not in plain]
    if every and not any(map(is_tensor, value.values())):
        return [*plain, *others]
    averaged = [key for key in others if _AVERAGED.search(key)]
    if plain:
        return [*plain, *averaged]
    if averaged == others and averaged and not any(map(is_tensor, value.values())):
        return averaged
    return [key for key in _KEYS if isinstance(value.get(key), Mapping)][:1]


def _parts(value: Mapping[Any, Any]) -> list[str]:
    """Return the keys, usual or not, under which there is nothing but weights."""
    return [
        key
        for key, item in value.items()
        if isinstance(key, str) and not _OTHERS.search(key) and _holds_weights(item, all)
    ]


def _holds_weights(value: object, of: Any, depth: int = _DEPTH - 1) -> bool:
    """Return whether a mapping is a state dict, or has one inside; ``of`` is `any` or `all`."""
    if not isinstance(value, Mapping) or "param_groups" in value:  # what optimizers have
        return False
    items = [(name, item) for name, item in value.items() if isinstance(name, str)]
    tensors = [is_tensor(item) for name, item in items if not is_extra(name)]
    if tensors and len(items) == len(value) and of(tensors):
        return True
    inner: Iterable[object] = (item for name, item in items if not _OTHERS.search(name))
    return depth > 1 and any(_holds_weights(item, all, depth - 1) for item in inner)


def _tensors(value: Mapping[Any, Any], where: str, left_out: list[str]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, item in value.items():
        if not isinstance(name, str):
            raise FormatError(f"{where} has the key {name!r:.60}; names of tensors must be text")
        if is_tensor(item):
            state[name] = item
        elif is_extra(name):
            left_out.append(name)
        else:
            # Quantised layers have theirs there, among the tensors of all others.
            advice = (
                "save that of the model as it was before it was quantised"
                if "_packed_params" in name
                else "save model.state_dict() alone, or under the key 'state_dict'"
            )
            if parts := _parts(value):
                advice += (
                    ", or say with weights_key (--weights-key) what of it is the model: "
                    f"{listed(list(map(repr, parts)))}"
                )
            raise FormatError(
                f"{where}: {name!r} is a {type(item).__name__}, not a tensor; {advice}"
            )
    return state
