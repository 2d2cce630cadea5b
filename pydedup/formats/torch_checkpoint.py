# SPDX-License-Identifier: Apache-2.0
"""Which weights a checkpoint holds: training scripts save them under a key, beside other things.

Several sets of weights, such as plain and averaged ones (EMA), are no one model: whoever adds them
says which. Deliberately not here: reading files (:mod:`pydedup.formats.torch`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

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
#: Of a mapping, by its id, how it was looked at, and whether there are weights.
_Known: TypeAlias = dict[tuple[int, Any, int], bool]


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
        The key of the weights, where there are several sets; of one inside of another, both with a
        dot between them.
    every_set
        Take all of them as one instead, each name behind its keys.

    Raises
    ------
    ArgumentError
        When there are several, and none is ``wanted``.
    NotFoundError
        When nothing has the key that is ``wanted``.
    FormatError
        When there is no state dict, or one with something else than tensors in it. Beside them may
        be an optimizer's state, numbers and texts (an epoch, say), which are left out.
    """
    if every_set and (found := dict(_all_tensors(loaded))):
        return Weights(found, None, ())
    path: list[str] = []
    left_out: list[str] = []
    known: list[str] = []
    rest = wanted
    value = loaded
    for _ in range(_DEPTH + (wanted or "").count(".")):  # who names one may know a deeper one
        if not isinstance(value, Mapping):
            break
        known += [_joined(path, key) for key, item in value.items() if isinstance(item, Mapping)]
        if rest is not None and (step := _first_key(value, rest)) is not None:
            sets, rest = [step], rest[len(step) + 1 :] or None
        else:
            sets = _sets_in(value)
        if not sets:
            break
        if len(sets) > 1 and rest is None:
            keys = [_joined(path, key) for key in sets]
            raise ArgumentError(
                f"{where} holds several sets of weights, under {listed(list(map(repr, keys)))}: "
                f"say which with weights_key (--weights-key), such as {keys[0]!r}"
            )
        if len(sets) > 1:
            break
        left_out += [str(key) for key in value if key != sets[0]]
        path += sets
        value = value[sets[0]]
    if rest is not None:
        there = it_has(str(wanted), known) if known else "; it is a state dict itself"
        raise NotFoundError(f"{where} has nothing under the key {wanted!r}{there}")
    key = ".".join(path) or None
    if not isinstance(value, Mapping):
        under = "" if key is None else f" under {key!r}"
        raise FormatError(
            f"{where} holds a value of type {type(value).__name__}{under}, not a state dict; save "
            "model.state_dict()"
        )
    return Weights(_tensors(value, where, path, left_out), key, tuple(left_out))


def is_extra(name: str) -> bool:
    """Return whether an entry of a state dict is what ``get_extra_state`` of a module gave."""
    return name.rpartition(".")[2] == "_extra_state"


def _joined(path: Sequence[str], key: object) -> str:
    return ".".join([*path, str(key)])


def _first_key(value: Mapping[Any, Any], wanted: str) -> str | None:
    """Return the key of a mapping that is wanted, or the first of several with dots between."""
    if wanted in value:
        return wanted
    begins = (key for key in value if isinstance(key, str) and wanted.startswith(f"{key}."))
    return next(begins, None)


def _all_tensors(loaded: object) -> Iterator[tuple[str, Any]]:
    """Yield all tensors that may be a model's, each mapping once: in a file, it may hold itself."""
    pending = [("", loaded)]
    seen: set[int] = set()
    while pending:
        before, value = pending.pop()
        if not isinstance(value, Mapping) or "param_groups" in value or id(value) in seen:
            continue
        seen.add(id(value))
        for key, item in value.items():
            if is_tensor(item):
                yield f"{before}{key}", item
            elif not _OTHERS.search(str(key)):
                pending.append((f"{before}{key}.", item))


def _sets_in(value: Mapping[Any, Any]) -> list[str]:
    """Return the usual keys in a mapping under which there are weights; none of a state dict."""
    known: _Known = {}
    plain = [key for key in _KEYS if _holds_weights(value.get(key), any, known)]
    others = [key for key in _parts(value, known) if key not in plain]
    averaged = [key for key in others if _AVERAGED.search(key)]
    if plain:
        return [*plain, *averaged]
    if averaged == others and averaged and not any(map(is_tensor, value.values())):
        return averaged
    return [key for key in _KEYS if isinstance(value.get(key), Mapping)][:1]


def _parts(value: Mapping[Any, Any], known: _Known) -> list[str]:
    """Return the keys, usual or not, under which there is nothing but weights."""
    return [
        key
        for key, item in value.items()
        if isinstance(key, str) and not _OTHERS.search(key) and _holds_weights(item, all, known)
    ]


def _holds_weights(value: object, of: Any, known: _Known, depth: int = _DEPTH - 1) -> bool:
    """Return whether a mapping is a state dict, or has one inside; ``of`` is `any` or `all`.

    What is ``known`` is not looked at again: in a file, a mapping may be there many times.
    """
    if not isinstance(value, Mapping) or "param_groups" in value:  # what optimizers have
        return False
    key = id(value), of, depth
    if key not in known:
        items = [(name, item) for name, item in value.items() if isinstance(name, str)]
        tensors = [is_tensor(item) for name, item in items if not is_extra(name)]
        known[key] = bool(tensors) and len(items) == len(value) and of(tensors)
        if not known[key] and depth > 1:
            inner = (item for name, item in items if not _OTHERS.search(name))
            known[key] = any(_holds_weights(item, all, known, depth - 1) for item in inner)
    return known[key]


def _is_beside(name: str, item: object) -> bool:
    """Return whether it is what a training script keeps next to the weights themselves.

    What a module has, as a quantised one does, is of a path of modules, with a dot.
    """
    if isinstance(item, Mapping):
        return _OTHERS.search(name) is not None
    return "." not in name and isinstance(item, str | int | float | None)


def _tensors(
    value: Mapping[Any, Any], where: str, path: Sequence[str], left_out: list[str]
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    has_weights = any(map(is_tensor, value.values()))
    for name, item in value.items():
        if not isinstance(name, str):
            raise FormatError(f"{where} has the key {name!r:.60}; names of tensors must be text")
        if is_tensor(item):
            state[name] = item
        elif is_extra(name) or (has_weights and _is_beside(name, item)):
            left_out.append(name)
        else:
            # Quantised layers have theirs there, among the tensors of all others.
            advice = (
                "save that of the model as it was before it was quantised"
                if "_packed_params" in name
                else "save model.state_dict() alone, or under the key 'state_dict'"
            )
            if parts := [_joined(path, key) for key in _parts(value, {})]:
                advice += (
                    ", or say with weights_key (--weights-key) what of it is the model: "
                    f"{listed(list(map(repr, parts)))}"
                )
            raise FormatError(
                f"{where}: {name!r} is of type {type(item).__name__}, not a tensor; {advice}"
            )
    return state
