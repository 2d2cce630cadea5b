# SPDX-License-Identifier: Apache-2.0
"""What an address means at each call, and what happens in the store meanwhile."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import pydedup
from pydedup.errors import ArgumentError, NotFoundError

from .conftest import net

torch = pytest.importorskip("torch")
nn = torch.nn

pytestmark = pytest.mark.usefixtures("no_grad")


X = torch.randn(3, 80)


# ---- versions -----------------------------------------------------------------------------------


def test_an_alias_and_the_newest_version_are_looked_up_per_call(store: pydedup.Store) -> None:
    one, two = net(), net()
    wanted = one(X), two(X)
    store.add("m@1", one)
    store.alias("m", "prod", "1")
    fixed, alias, newest = (store.attach(net(), name) for name in ("m@1", "m@prod", "m"))
    for module in (fixed, alias, newest):
        torch.testing.assert_close(module(X), wanted[0])
    store.add("m@2", two)
    torch.testing.assert_close(newest(X), wanted[1])
    torch.testing.assert_close(alias(X), wanted[0])
    store.alias("m", "prod", "2")
    torch.testing.assert_close(alias(X), wanted[1])
    torch.testing.assert_close(fixed(X), wanted[0])
    store.detach(alias)
    assert torch.equal(alias[0].weight, two[0].weight)


def test_a_symbolic_trace_is_of_the_version_of_its_call(store: pydedup.Store) -> None:
    from torch.fx import symbolic_trace

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.weight = net(), nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Any) -> Any:
            return self.net(x).relu() @ self.weight

    one, two = Own().eval(), Own().eval()
    store.add("m", one)
    traced = symbolic_trace(store.attach(Own().eval(), "m"))
    torch.testing.assert_close(traced(X), one(X))
    store.add("m", two)
    torch.testing.assert_close(traced(X), two(X))
    with pytest.raises(ArgumentError, match="has no state_dict"):
        traced.state_dict()


def test_a_fixed_version_that_was_removed_and_added_again(store: pydedup.Store) -> None:
    one, two = net(), net()
    store.add("m@1", one)
    module = store.attach(net(), "m@1")
    torch.testing.assert_close(module(X), one(X))
    store.remove("m@1")
    store.add("m@1", two)
    torch.testing.assert_close(module(X), two(X))
    store.vacuum()
    torch.testing.assert_close(module(X), two(X))
    assert torch.equal(store.detach(module)[0].weight, two[0].weight)


def test_on_every_back_end(store_url: str) -> None:
    one, two = net(), net()
    with pydedup.open(store_url) as store:
        store.add("m@1", one)
        store.add("m@2", two)
        store.alias("m", "prod", "1")
        with pydedup.open(store_url, mode="r", memory="8MiB") as reader:
            module = reader.attach(net(), "m@prod")
            torch.testing.assert_close(module(X), one(X))
            store.alias("m", "prod", "2")
            torch.testing.assert_close(module(X), two(X))
            assert torch.equal(reader.detach(module)[0].weight, two[0].weight)


class Constant(nn.Module):
    """Many layers that each give back the number of the version, so that a mixture shows."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(6))
        self.norm = nn.BatchNorm1d(1)
        for layer in self.layers:
            layer.weight.fill_(0)
            layer.bias.fill_(value)
        self.norm.running_mean.fill_(value)

    def part(self, x: Any) -> Any:
        return torch.cat([layer(x) for layer in self.layers], 1)

    def forward(self, x: Any, between: Callable[[], None] | None = None) -> Any:
        first = self.part(x)
        if between is not None:
            between()
        return torch.cat([first, self.part(x), x - self.norm(x)], 1)


def test_a_call_never_mixes_versions(store: pydedup.Store) -> None:
    for version in (1, 2):
        store.add(f"m@{version}", Constant(version).eval())
    store.alias("m", "prod", "1")
    module = store.attach(Constant(0).eval(), "m@prod")
    zero = torch.zeros(1, 1)
    y = module(zero, lambda: store.alias("m", "prod", "2"))
    assert y.round().unique().tolist() == [1]
    assert module(zero).round().unique().tolist() == [2]


class Between(nn.Module):
    """Gives its input back, and does something first."""

    def __init__(self, do: Callable[[], None]) -> None:
        super().__init__()
        self.do = do

    def forward(self, x: Any) -> Any:
        self.do()
        return x


def test_a_part_without_weights_of_its_own_does_not_mix_them_either(store: pydedup.Store) -> None:
    def made(value: float, do: Callable[[], None]) -> Any:
        part = nn.Sequential(nn.Linear(1, 1), Between(do), nn.Linear(1, 1)).eval()
        for number in (0, 2):
            part[number].weight.fill_(1)
            part[number].bias.fill_(value)
        return nn.ModuleDict({"part": part}).eval()

    for version in (1, 2):
        store.add(f"m@{version}", made(version, lambda: None))
    store.alias("m", "prod", "1")
    module = store.attach(made(0, lambda: store.alias("m", "prod", "2")), "m@prod")
    zero = torch.zeros(1, 1)
    assert module["part"](zero).item() == 2
    assert module["part"](zero).item() == 4


def test_two_threads_while_the_alias_changes(store: pydedup.Store) -> None:
    for version in (1, 2):
        store.add(f"m@{version}", Constant(version).eval())
    store.alias("m", "prod", "1")
    module = store.attach(Constant(0).eval(), "m@prod")
    seen: list[set[float]] = []
    failed: list[BaseException] = []
    stop = threading.Event()

    def call() -> None:
        try:
            with torch.no_grad():
                while not stop.is_set():
                    seen.append(set(module(torch.zeros(1, 1)).round().unique().tolist()))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(60):
        store.alias("m", "prod", str(1 + number % 2))
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(len(values) == 1 for values in seen)
    assert set().union(*seen) == {1.0, 2.0}


def test_a_version_that_does_not_fit_is_refused_and_changes_nothing(store: pydedup.Store) -> None:
    store.add("m@1", net())
    module = store.attach(net(), "m")
    wanted = module(X)
    store.add("m@2", nn.Sequential(nn.Linear(80, 71), nn.ReLU(), nn.Linear(71, 5)))
    with pytest.raises(
        ArgumentError, match=r"m@2 does not fit Sequential: different: 0.weight has"
    ):
        module(X)
    store.remove("m@2")
    assert torch.equal(module(X), wanted)


class Positions(nn.Module):
    """As in transformers: files of it had the positions, and have them no more."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("ids", torch.arange(8), persistent=False)

    def forward(self, x: Any) -> Any:
        return self.norm(self.linear(x)) + self.ids


@pytest.mark.parametrize("order", ["12", "21"])
def test_versions_with_and_without_a_buffer_that_is_not_in_the_state(
    store: pydedup.Store, order: str
) -> None:
    """The one was said not to fit a module that was attached to the other."""
    module, x = Positions().eval(), torch.randn(3, 8)
    state = module.state_dict()
    store.add("m@1", {**state, "ids": module.ids})
    store.add("m@2", {**state, "linear.bias": state["linear.bias"] + 1})
    store.add("m@3", {**state, "ids": module.ids + 1})
    attached = Positions().eval()
    for version in order:
        store.alias("m", "now", version)
        if version == order[0]:
            store.attach(attached, "m@now")
        module.load_state_dict(store.load_torch(f"m@{version}"), strict=False)
        torch.testing.assert_close(attached(x), module(x))
    store.alias("m", "now", "3")
    with pytest.raises(ArgumentError, match="different: ids is not what the module has there"):
        attached(x)
    store.attach(other := Positions().eval(), "m@3")
    assert torch.equal(other.ids, torch.arange(8) + 1)


def test_a_version_with_counters_that_the_first_has_not(store: pydedup.Store) -> None:
    module, x = Positions().eval(), torch.randn(3, 8)
    state = module.state_dict()
    store.add("m@2", state)
    del state["norm.num_batches_tracked"]
    store.add("m@1", state)
    store.alias("m", "now", "1")
    attached = store.attach(Positions().eval(), "m@now")
    store.alias("m", "now", "2")
    torch.testing.assert_close(attached(x), module(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_version_without_counters_that_the_first_has(store: pydedup.Store, device: str) -> None:
    """As saved by others than torch; torch takes them for 0 as well."""
    module, x = Positions().eval(), torch.randn(3, 8)
    module.norm.num_batches_tracked.fill_(7)
    state = module.state_dict()
    store.add("m@1", state)
    del state["norm.num_batches_tracked"]
    store.add("m@2", state)
    with torch.device(device):
        attached = Positions().eval()
    attached.ids = module.ids
    store.alias("m", "now", "1")
    store.attach(attached, "m@now")
    assert attached.norm.num_batches_tracked == 7
    store.alias("m", "now", "2")
    torch.testing.assert_close(attached(x), module(x))
    assert attached.norm.num_batches_tracked == 0
    store.detach(attached)
    assert attached.norm.num_batches_tracked == 0
    torch.testing.assert_close(attached(x), module(x))


def test_what_a_version_had_loaded_is_freed_with_it(store: pydedup.Store) -> None:
    from pydedup.serving.attached.modules import attachment_of

    store.add("m@1", net())
    module = store.attach(net(), "m")
    module(X)
    old = weakref.ref(attachment_of(module).weights().loaded(1))  # type: ignore[union-attr]
    assert old() is not None
    store.add("m@2", net())
    module(X)
    gc.collect()
    assert old() is None


# ---- what happens in the store meanwhile ---------------------------------------------------------


def test_a_vacuum_moves_blocks(store: pydedup.Store) -> None:
    module, others = net(), [net() for _ in range(3)]
    wanted = module(X)
    for number, other in enumerate(others):
        store.add(f"other-{number}", other)
    store.add("m", module)
    attention = nn.MultiheadAttention(64, 2).eval()
    store.add("a", attention)
    x, y = torch.randn(3, 64), torch.randn(3, 64)
    attended = attention(x, y, y)[0]
    store.attach(module, "m@1")(X)
    store.attach(attention, "a")(x, y, y)
    for number in range(len(others)):
        store.remove(f"other-{number}")
    assert store.vacuum().freed_pages > 0
    torch.testing.assert_close(module(X), wanted)
    torch.testing.assert_close(attention(x, y, y)[0], attended)


def test_a_model_that_is_removed(store: pydedup.Store) -> None:
    module = net()
    store.add("m@1", module)
    store.add("n@1", net())
    store.attach(module, "m@1")
    newest = store.attach(net(), "n")
    store.remove("m@1")
    store.remove("n@1")
    store.vacuum()
    with pytest.raises(NotFoundError, match="no model 'n'"):
        newest(X)
    with pytest.raises(NotFoundError, match="no model 'm'"):
        module(X)


def test_a_forked_child(store: pydedup.Store) -> None:
    module = net()
    store.add("m", module)
    wanted = store.attach(module, "m")(X)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.allclose(module(X), wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0
