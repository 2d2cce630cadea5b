# SPDX-License-Identifier: Apache-2.0
"""A store to attach modules to, a module, the comparison that most tests here make."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pydedup


def net() -> Any:
    """Return two dense layers, with weights drawn anew."""
    from torch import nn

    return nn.Sequential(nn.Linear(80, 70), nn.ReLU(), nn.Linear(70, 5)).eval()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[pydedup.Store]:
    with pydedup.open(tmp_path / "attach.db", memory="64MiB") as opened:
        yield opened


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Draw the same weights in each test, and record nothing for gradients."""
    import torch

    torch.manual_seed(7)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., set[str]]]:
    """Compare a module with itself attached; return the names of the matrices it had to load."""
    path = tmp_path_factory.mktemp("checked") / "attach.db"
    with pydedup.open(path, memory="64MiB") as opened:
        yield functools.partial(_compare, opened, itertools.count())


def _compare(
    store: pydedup.Store,
    numbers: Iterator[int],
    module: Any,
    *inputs: Any,
    rtol: float = 1e-4,
    **options: Any,
) -> set[str]:
    import torch

    module = module.eval()
    name = f"checked-{next(numbers)}"
    store.add(name, module)
    attached = store.attach(copy.deepcopy(module), name)
    with torch.no_grad():
        wanted, got = module(*inputs, **options), attached(*inputs, **options)
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol)
    found = _loaded(attached)
    back = store.detach(attached)
    assert back is attached
    assert type(back) is type(module)
    with torch.no_grad():
        torch.testing.assert_close(back(*inputs, **options), wanted, rtol=0, atol=0)
    assert_same_state(back, module)
    return found


@pytest.fixture(scope="session")
def loaded() -> Callable[[Any], set[str]]:
    """Give the function that names the matrices which an attached module has loaded."""
    return _loaded


def _loaded(module: Any) -> set[str]:
    """Return the names of the tensors of two axes or more that an attached module has loaded."""
    from pydedup.serving.attached.modules import attachment_of

    attachment = attachment_of(module)
    assert attachment is not None
    slots = attachment.slots
    held = attachment.weights()._loaded
    return {slots[number].names[0] for number in held if len(slots[number].shape) > 1}


def assert_same_state(module: Any, other: Any) -> None:
    import torch

    state, wanted = module.state_dict(), other.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    flags = [(n, p.requires_grad) for n, p in module.named_parameters(remove_duplicate=False)]
    assert flags == [
        (n, p.requires_grad) for n, p in other.named_parameters(remove_duplicate=False)
    ]
