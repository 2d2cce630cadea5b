# SPDX-License-Identifier: Apache-2.0
"""Attaching as such: versions, tied weights, buffers, what fits and what does not, refusals."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, BudgetError, NotFoundError
from pydedup.opening import connect_store

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    torch.manual_seed(7)
    with torch.no_grad():
        yield


def net() -> Any:
    return nn.Sequential(nn.Linear(80, 70), nn.ReLU(), nn.Linear(70, 5)).eval()


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


# ---- tied weights and buffers -------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, 70)
        self.head = nn.Linear(70, 90, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Any) -> Any:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("left_out", [None, "head.weight", "embed.weight"])
def test_tied_weights(store: pydedup.Store, left_out: str | None) -> None:
    module = Tied().eval()
    ids = torch.arange(90).view(3, 30)
    wanted = module(ids)
    state = module.state_dict()
    state.pop(left_out, None)  # files of safetensors have one of the names
    store.add("m", state)
    store.attach(module, "m")
    assert module.head.weight is module.embed.weight
    assert len(list(module.parameters())) == 1
    torch.testing.assert_close(module(ids), wanted, rtol=1e-4, atol=1e-4)
    store.detach(module)
    assert module.head.weight is module.embed.weight
    assert torch.equal(module(ids), wanted)


def test_tensors_that_are_tied_in_the_module_alone(store: pydedup.Store) -> None:
    module = Tied().eval()
    state = dict(module.state_dict())
    state["head.weight"] = torch.randn(90, 70)
    store.add("m", state)
    with pytest.raises(
        ArgumentError, match=r"embed\.weight, head\.weight are one tensor in the mod"
    ):
        store.attach(module, "m")


def test_tensors_that_are_alike_but_for_their_page(store: pydedup.Store) -> None:
    module = nn.ModuleList([nn.Linear(200, 1024, bias=False) for _ in range(2)]).eval()
    store.add("m", module, block_shape=(1024, 200))  # the first on its page, each
    module[1].weight = module[0].weight
    with pytest.raises(ArgumentError, match="are one tensor in the module, and not here"):
        store.attach(module, "m")


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.randn(6))
        self.register_buffer("table", torch.arange(6.0), persistent=False)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        return self.linear(x) + self.kept + self.table


def test_buffers(store: pydedup.Store) -> None:
    module = Buffers().eval()
    wanted = module(torch.ones(6))
    store.add("m", module)
    store.add("with", {**module.state_dict(), "table": torch.zeros(6)})
    other = Buffers().eval()
    torch.testing.assert_close(store.attach(other, "m")(torch.ones(6)), wanted)
    assert type(other.table) is torch.Tensor
    store.detach(other)
    assert torch.equal(other.table, torch.arange(6.0))
    store.attach(other, "with")
    torch.testing.assert_close(other(torch.ones(6)), wanted - torch.arange(6.0))
    assert "table" not in store.detach(other).state_dict()
    assert torch.equal(other.table, torch.zeros(6))


def test_a_module_without_memory(store: pydedup.Store) -> None:
    module = net()
    store.add("m", module)
    with torch.device("meta"):
        empty = net()
    torch.testing.assert_close(store.attach(empty, "m")(X), module(X))
    assert empty[0].weight.device.type == "cpu"
    assert torch.equal(store.detach(empty)(X), module(X))


def test_buffers_without_memory_must_be_stored_or_given(store: pydedup.Store) -> None:
    module = Buffers().eval()
    store.add("m", module)
    with torch.device("meta"):
        empty = Buffers().eval()
    with pytest.raises(ArgumentError, match=r"have no values, being on the meta device.*: table;"):
        store.attach(empty, "m")
    assert empty.linear.weight.is_meta
    empty.table = torch.arange(6.0)
    torch.testing.assert_close(store.attach(empty, "m")(torch.ones(6)), module(torch.ones(6)))


class Extra(nn.BatchNorm1d):
    """Has a state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"epoch": 3}


def test_what_a_store_need_not_have(store: pydedup.Store) -> None:
    """How many batches a norm has seen, which older checkpoints lack, and what is no tensor."""
    module = Extra(80).eval()
    module.num_batches_tracked.fill_(7)
    state = module.state_dict()
    store.add(
        "m", {name: state[name] for name in ("weight", "bias", "running_mean", "running_var")}
    )
    wanted = module(X)
    torch.testing.assert_close(store.attach(module, "m")(X), wanted)
    assert list(store.detach(module).state_dict()) == list(state)
    assert module.num_batches_tracked == 7


# ---- what fits ----------------------------------------------------------------------------------


def test_all_that_differs_is_listed_and_nothing_changed(store: pydedup.Store) -> None:
    module = net()
    state = dict(module.state_dict())
    del state["2.bias"]
    state["0.weight"] = state["0.weight"][:60]
    state["0.bias"] = torch.ones(70, dtype=torch.int64)
    store.add("m", {**state, "more": torch.ones(2)})
    before = [id(parameter) for parameter in module.parameters()]
    with pytest.raises(ArgumentError) as caught:
        store.attach(module, "m")
    assert str(caught.value) == (
        "m@1 does not fit Sequential: missing in the store: 2.bias; not in the module: more; "
        "different: 0.weight has shape (60, 80), not (70, 80), 0.bias is int64, not torch.float32"
    )
    assert [id(parameter) for parameter in module.parameters()] == before
    assert type(module) is nn.Sequential


def test_a_prefix(store: pydedup.Store) -> None:
    whole = nn.ModuleDict({"body": net(), "head": nn.Linear(5, 2)}).eval()
    store.add("m", whole)
    body = store.attach(net(), "m", prefix="body.")
    torch.testing.assert_close(body(X), whole["body"](X))
    with pytest.raises(ArgumentError, match=r"missing in the store: body\.weight, body\.bias"):
        store.attach(nn.Linear(5, 2).eval(), "m", prefix="body.")


def test_a_module_without_weights(store: pydedup.Store) -> None:
    """As a part may be of one that is attached piece by piece."""
    store.add("m", net())
    module = store.attach(nn.ReLU().eval(), "m", prefix="between.")
    assert torch.equal(module(X), X.relu())
    with pytest.raises(ArgumentError, match="is attached to m already"):
        store.attach(module, "m")
    assert type(store.detach(module)) is nn.ReLU


def test_an_unknown_model(store: pydedup.Store) -> None:
    store.add("m", net())
    for name in ("x", "m@2"):
        with pytest.raises(NotFoundError):
            store.attach(net(), name)


def test_modules_that_cannot_be_attached(store: pydedup.Store) -> None:
    module = net()
    store.add("m", module)
    module[1].train()
    with pytest.raises(ArgumentError, match=r"in training mode \(1\): call module.eval\(\) first"):
        store.attach(module, "m")
    with pytest.raises(ArgumentError, match=r"takes a torch.nn.Module, not a dict"):
        store.attach({}, "m")  # type: ignore[type-var]
    with pytest.raises(ArgumentError, match="prefix must be a text"):
        store.attach(net(), "m", prefix=b"body.")  # type: ignore[arg-type]
    lazy = nn.LazyLinear(5).eval()
    with pytest.raises(ArgumentError, match="'weight' is a UninitializedParameter"):
        store.attach(lazy, "m")
    module.eval()
    outer = nn.Sequential(store.attach(module, "m")).eval()
    for again in (module, outer):
        with pytest.raises(ArgumentError, match="is attached to m already; detach it first"):
            store.attach(again, "m")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace", "freeze"])
def test_torchscript_is_refused_and_left_as_it_was(store: pydedup.Store, how: str) -> None:
    module = net()
    store.add("m", module)
    script = torch.jit.trace(module, X) if how == "trace" else torch.jit.script(module)
    script = torch.jit.freeze(script) if how == "freeze" else script
    for refused in (script, nn.Sequential(script).eval()):
        with pytest.raises(ArgumentError, match=r"is TorchScript, .* it was made from"):
            store.attach(refused, "m")
        assert torch.equal(refused(X), module(X))


class Equal(nn.Linear):
    """Equal to each other of the same size, and without a hash."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal) and self.weight.shape == other.weight.shape


class OfEqual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Equal(80, 80), Equal(80, 80)
        self.training = self.first.training = self.second.training = False  # eval() needs a hash

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OfEqual)

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x))


def test_modules_are_told_apart_by_identity(store: pydedup.Store) -> None:
    module = OfEqual()
    wanted = module(X)
    store.add("m", module.state_dict())
    attached = store.attach(OfEqual(), "m")
    torch.testing.assert_close(attached(X), wanted)
    assert attached.float() is attached
    assert torch.equal(store.detach(attached)(X), wanted)


class Last(nn.Linear):
    def __init_subclass__(cls) -> None:
        raise TypeError("no more of them")


def test_a_class_that_cannot_be_replaced(store: pydedup.Store) -> None:
    module = nn.Sequential(nn.Linear(80, 70), Last(70, 5)).eval()
    wanted = module(X)
    store.add("m", module)
    with pytest.raises(ArgumentError, match="a Last cannot be attached: no more"):
        store.attach(module, "m")
    assert [type(part) for part in module.modules()] == [nn.Sequential, nn.Linear, Last]
    assert torch.equal(module(X), wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantised_modules_are_refused(store: pydedup.Store) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}).eval()
    store.add("m", net())
    with pytest.raises(ArgumentError, match=r"is no tensor of a module but a .*quantised"):
        store.attach(quantised, "m")


# ---- what an attached module refuses ------------------------------------------------------------


def forward_mode(module: Any) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return module(torch.autograd.forward_ad.make_dual(X, X))


IDS = torch.tensor([0, -1])


def make_fx(module: Any) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(module)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "state_dict": (lambda m: m.state_dict(), "has no state_dict"),
    "state_dict of a part": (lambda m: m[0].state_dict(), "Linear, attached to m, has no state_d"),
    "state_dict around": (lambda m: nn.Sequential(m).state_dict(), "has no state_dict"),
    "load_state_dict": (lambda m: m.load_state_dict({}), "takes no state dict"),
    "deepcopy": (copy.deepcopy, "cannot be copied"),
    "copy": (copy.copy, "cannot be pickled or copied"),
    "copy of a weight": (lambda m: copy.deepcopy(m[0].weight), "'0.weight' of m is in a store"),
    "pickle": (pickle.dumps, "cannot be pickled"),
    "pickle of a weight": (lambda m: pickle.dumps(m[0].weight), "cannot be pickled"),
    "torch.save": (lambda m: torch.save(m, io.BytesIO()), "cannot be pickled"),
    "half": (lambda m: m.half(), r"cannot become torch.float16 on cpu"),
    "half of a part": (lambda m: m[0].half(), r"cannot become torch.float16 on cpu"),
    "to": (lambda m: m.to("meta"), r"cannot become torch.float32 on meta"),
    "train": (lambda m: m.train()(X), "is in training mode"),
    "train of a part": (lambda m: (m[0].train(), m(X)), "is in training mode"),
    "zero_": (lambda m: m[0].weight.zero_(), r"cannot be changed \(by zero_\)"),
    "data": (lambda m: m[0].weight.data.mul_(2), r"cannot be changed \(by mul_\)"),
    "+=": (lambda m: m[0].weight.__iadd__(1), r"cannot be changed"),
    "item": (lambda m: m[0].weight.__setitem__(0, 1), r"cannot be changed \(by __setitem__\)"),
    "init": (lambda m: nn.init.normal_(m[0].weight), r"cannot be changed \(by normal_\)"),
    "out": (lambda m: torch.add(X, X, out=m[0].weight), r"cannot be changed \(by add\)"),
    "inplace": (lambda m: nn.functional.relu(m[0].bias, inplace=True), "'0.bias' of m@1 is in a"),
    "several at once": (lambda m: torch._foreach_mul_([m[0].bias], 2.0), "cannot be changed"),
    "view": (lambda m: (m[0].bias.view(7, 10).fill_(9), m(X)), "was changed in place, maybe"),
    "view of a matrix": (lambda m: (m[0].weight.flatten().zero_(), m[0].weight + 1), "was changed"),
    "requires_grad_": (lambda m: m.requires_grad_(), "has no gradient"),
    "a dual number": (forward_mode, "has a tangent, and streamed weights give none"),
    "script": (torch.jit.script, "cannot be compiled by TorchScript"),
    "trace": (lambda m: torch.jit.trace(m, X), "cannot be traced, compiled or exported"),
    "make_fx": (lambda m: make_fx(m)(X), "cannot be traced, compiled or exported"),
    "export": (lambda m: torch.export.export(m, (X,)), "cannot be traced, compiled or exported"),
    "trace of a weight": (
        lambda m: torch.jit.trace(lambda x: x @ m[0].weight.T, X, check_trace=False),
        "'0.weight' of m cannot be traced",
    ),
    "make_fx of a bias": (lambda m: make_fx(lambda x: x + m[2].bias)(X[:, :5]), "cannot be traced"),
    "make_fx of rows": (lambda m: make_fx(lambda x: m[0].weight[x])(IDS), "cannot be traced"),
    "compile": (lambda m: m.compile(), "cannot be compiled"),
    "integers": (lambda m: m(X.long()), "is torch.int64; floats are needed"),
    "shape": (lambda m: m(X[:, :9]), r"x has shape \(3, 9\)"),
    "device": (lambda m: m(X.to("meta")), "the input is on meta"),
    "sparse": (lambda m: m(X.to_sparse()), "is no plain tensor in memory"),
    "vmap": (lambda m: torch.vmap(m)(X), "cannot be part of what torch.func transforms"),
    "jvp": (lambda m: torch.func.jvp(m, (X,), (X,)), "cannot be part of what torch.func"),
    "vmap of a part": (
        lambda m: torch.vmap(lambda x: nn.functional.linear(x, m[0].weight))(X),
        "is no plain tensor in memory",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("what", REFUSED)
def test_refusals(store: pydedup.Store, what: str) -> None:
    use, message = REFUSED[what]
    module = net()
    store.add("m", module)
    wanted = module(X)
    torch.testing.assert_close(store.attach(module, "m")(X), wanted)
    with pytest.raises(ArgumentError, match=message):
        use(module)
    torch.testing.assert_close(module.eval()(X), wanted)


def test_gradients_are_refused(store: pydedup.Store) -> None:
    module = net()
    store.add("m", module)
    store.attach(module, "m")
    x = X.clone().requires_grad_()
    assert not module(x).requires_grad
    with torch.enable_grad(), pytest.raises(ArgumentError, match="requires a gradient, and stream"):
        module(x)
    with torch.enable_grad():
        assert not module(X).requires_grad


def test_running_statistics_are_not_updated(store: pydedup.Store) -> None:
    module = nn.Sequential(nn.BatchNorm1d(80)).eval()
    store.add("m", module)
    store.attach(module, "m")
    module[0].training = True
    with pytest.raises(ArgumentError, match="is in training mode"):
        module(X)


def test_autocast_is_refused(store: pydedup.Store) -> None:
    module = net()
    store.add("m", module)
    store.attach(module, "m")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ArgumentError, match="autocast"):
        module(X)


def test_what_changes_nothing_is_allowed(store: pydedup.Store) -> None:
    module = net()
    store.add("m", module)
    wanted = module(X)
    parts = repr(module)
    store.attach(module, "m")
    assert repr(module) == parts
    assert isinstance(module, nn.Sequential)
    assert module.to("cpu").float().to(torch.float32).eval() is module
    assert not any(p.requires_grad for p in module.requires_grad_(False).parameters())
    assert sum(p.numel() for p in module.parameters()) == 80 * 70 + 70 + 70 * 5 + 5
    assert all(isinstance(p, nn.Parameter) for p in module.parameters())
    assert dict(module.named_parameters()).keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert module[0].weight.dtype is torch.float32
    assert "StoredParameter '0.weight' of m (70, 80)" in repr(module[0].weight)
    torch.testing.assert_close(module[:2](X), nn.functional.relu(module[0](X)))
    torch.testing.assert_close(module(X), wanted)
    assert np.array_equal(module[0].weight.numpy(), store.load("m")["0.weight"])


def test_arrays_of_weights_are_read_only(store: pydedup.Store) -> None:
    module = net()
    store.add("m", module)
    wanted = module(X)
    bias = store.attach(module, "m")[0].bias
    for array in (bias.numpy(), bias.detach().numpy(), np.asarray(bias)):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 9
    np.asarray(bias, np.float64)[:] = 9
    np.from_dlpack(bias)[:] = 9
    torch.from_dlpack(bias).fill_(9)
    torch.testing.assert_close(module(X), wanted)


def test_who_reads_memory_without_asking_gets_an_error(store: pydedup.Store) -> None:
    """There is none behind a stored tensor: reading at its address ended the process."""
    module = net()
    store.add("m", module)
    weight = store.attach(module, "m")[0].weight
    for view in (weight, weight[:9], weight.T):
        with pytest.raises(RuntimeError, match="Cannot access data pointer"):
            torch.utils.dlpack.to_dlpack(view)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("what", ["module", "weights"])
def test_compiling_changes_nothing(store: pydedup.Store, what: str) -> None:
    torch.compiler.reset()
    one, two = net(), net()
    store.add("m@1", one)
    module = store.attach(net(), "m")

    def with_weights(x: Any) -> Any:
        x = nn.functional.linear(x, module[0].weight, module[0].bias).relu()
        return x @ module[2].weight.T + module[2].bias

    compiled = torch.compile(module if what == "module" else with_weights, backend="eager")
    torch.testing.assert_close(compiled(X), one(X))
    store.add("m@2", two)
    torch.testing.assert_close(compiled(X), two(X))
    store.detach(module)
    torch.testing.assert_close(compiled(X), two(X))


def test_inference_mode(store: pydedup.Store) -> None:
    module = net()
    store.add("m", module)
    wanted = module(X)
    store.attach(module, "m")
    with torch.inference_mode():
        torch.testing.assert_close(module(X), wanted)
        store.detach(module)
    with torch.enable_grad():
        module(X).sum().backward()
    assert module[0].weight.grad is not None


def test_ids_that_are_no_plain_tensor_are_refused(store: pydedup.Store) -> None:
    module = nn.Embedding(9, 4).eval()
    store.add("m", module)
    store.attach(module, "m")
    ids = torch.arange(6).view(2, 3)
    for given in (ids.to("meta"), ids.to_sparse()):
        with pytest.raises(ArgumentError, match="input of 'weight' of m is no plain tensor"):
            module(given)


# ---- detaching, budget, life ---------------------------------------------------------------------


def test_detaching_what_is_not_attached(store: pydedup.Store, tmp_path: Path) -> None:
    module = net()
    store.add("m", module)
    store.attach(module, "m")
    for other in (net(), module[0]):
        with pytest.raises(ArgumentError, match="is not attached; detach takes what attach was g"):
            store.detach(other)
    with (
        pydedup.open(tmp_path / "other.db") as other_store,
        pytest.raises(ArgumentError, match="attached to m of another store"),
    ):
        other_store.detach(module)
    assert type(store.detach(module)) is nn.Sequential


def test_no_list_keeps_weights_of_recurrent_layers(store: pydedup.Store) -> None:
    layer = nn.LSTM(12, 9).eval()
    kept = [weakref.ref(weight) for weight in layer.parameters()]
    store.add("m", layer)
    store.attach(layer, "m")
    assert [weight() for weight in kept] == [None] * 4
    store.detach(layer)
    assert all(isinstance(weight, nn.Parameter) for weight in layer._flat_weights)


def test_a_call_that_was_taken_before(store: pydedup.Store) -> None:
    """As torch.compile takes it of a module."""
    module = net()
    store.add("m", module)
    taken = store.attach(module, "m").__call__
    assert torch.equal(store.detach(module)(X), taken(X))


def test_a_weight_of_another_attached_module_stays_that(store: pydedup.Store) -> None:
    one, two = net(), net()
    store.add("m@1", one)
    store.add("m@2", two)
    module, other = store.attach(net(), "m@1"), store.attach(net(), "m@2")
    module[2].weight = other[2].weight
    one[2].weight = two[2].weight
    torch.testing.assert_close(module(X), one(X))
    torch.testing.assert_close(store.detach(module)(X), one(X))
    assert module[2].weight is other[2].weight


def test_what_somebody_replaced_stays_when_detaching(store: pydedup.Store) -> None:
    module = net()
    store.add("m", module)
    store.attach(module, "m")
    module[2] = nn.Linear(70, 3).eval()
    assert module(X).shape == (3, 3)
    with pytest.raises(ArgumentError, match="cannot be copied"):
        copy.deepcopy(module)
    head = module[2]
    assert store.detach(module)[2] is head


@pytest.mark.parametrize("how", ["replaced", "removed", "moved"])
def test_parts_that_are_no_longer_where_they_were(store: pydedup.Store, how: str) -> None:
    module = nn.Sequential(nn.Linear(80, 9), nn.Sequential(nn.ReLU(), nn.Linear(9, 2))).eval()
    store.add("m", module)
    wanted = module(X) if how == "moved" else module[0](X)
    store.attach(module, "m")
    head = module[1]
    if how == "replaced":
        module[1] = nn.Identity()
    elif how == "removed":
        del module[1]
    else:
        module.insert(0, nn.Identity())
    store.detach(module)
    torch.testing.assert_close(module(X), wanted)
    assert all(type(weight) is nn.Parameter for weight in module.parameters())
    assert head(torch.ones(4, 9)).shape == (4, 2)


def test_a_class_that_was_made_of_an_attached_one(store: pydedup.Store) -> None:
    module = net()
    store.add("m", module)
    wanted = module(X)
    store.attach(module, "m")
    nn.utils.parametrizations.weight_norm(module[2])
    with pytest.raises(ArgumentError, match="'2' in the module has become a ParametrizedLinear"):
        store.detach(module)
    torch.testing.assert_close(module(X), wanted)  # it is attached as before
    nn.utils.parametrize.remove_parametrizations(module[2], "weight")
    torch.testing.assert_close(store.detach(module)(X), wanted)
    assert type(module[2]) is nn.Linear


def test_a_module_is_freed_without_a_collection_of_circles(store: pydedup.Store) -> None:
    module = net()
    store.add("m", module)
    store.attach(module, "m")(X)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(module)
        del module
        assert gone() is None
    finally:
        gc.enable()


def test_what_is_loaded_is_counted(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv3d(32, 64, 5)).eval()  # 1 MB that no kernel streams
    x = torch.randn(1, 32, 5, 5, 5)
    wanted = module(x)
    with pydedup.open(tmp_path / "small.db", memory="6MiB") as store:
        store.add("m", module)
        free = store.stats().pool["reserved_bytes"]
        store.attach(module, "m")
        assert torch.equal(module(x), wanted)
        assert store.stats().pool["reserved_bytes"] - free == 4 * (32 * 64 * 125 + 64)
        store.detach(module)
        assert store.stats().pool["reserved_bytes"] == free
    adapter = connect_store(tmp_path / "small.db", mode="r")
    with pydedup.Store(adapter, 1 << 20) as store:  # less than `pydedup.open` takes
        store.attach(module, "m")
        with pytest.raises(
            BudgetError, match=r"'0.weight' of m@1 cannot be streamed by Sequential"
        ):
            module(x)


def test_activations_are_taken_off_the_pool_for_a_call(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(80, 70)

        def forward(self, x: Any) -> Any:
            large = x.repeat(8, 1)
            assert len(x), "no rows"
            seen.append(store._pool.stats()["reserved_bytes"])
            return self.linear(x) + large.sum()

    def reserved(n_rows: int) -> int:
        module(torch.ones(n_rows, 80))
        assert store._pool.stats()["reserved_bytes"] == bias
        return seen[-1] >> 20

    seen: list[int] = []
    bias = 70 * 4  # is loaded
    rows = 2 * (1 << 20) // (80 * 4)  # of 2 MiB: 16 of them repeated, 4 in and around the product
    # Scratch has 16 MiB for activations, the pool gives up to 16 more.
    with pydedup.open(tmp_path / "a.db", memory="64MiB") as store:
        store.add("m", Wide())
        module = store.attach(Wide().eval(), "m")
        assert reserved(rows) == 16  # nothing is known: all that there is
        assert reserved(rows) == 3
        assert reserved(rows // 2 + 1) == 3  # as of a call that is larger, but not much
        assert reserved(rows // 3) == 3  # the same, but measured
        assert reserved(rows // 3) == 0
        assert reserved(rows * 6 // 5) == 12  # perhaps by the square of what it is larger
        assert reserved(rows * 3 // 2) == 16  # measured
        assert reserved(rows * 3 // 2) == 13
        assert reserved(rows * 5) == reserved(rows * 5) == 16  # more than there is
        module = store.attach(Wide().eval(), "m")
        assert reserved(rows) == 3  # known of an equal one
        with pytest.raises(AssertionError, match="no rows"):
            module(torch.ones(0, 80))
        assert store._pool.stats()["reserved_bytes"] == bias
        assert reserved(rows) == 3


def test_a_batch_is_cut_where_rows_are_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    relu = nn.ReLU.forward

    def noted(self: Any, x: Any) -> Any:
        sizes.append(len(x))
        return relu(self, x)

    def pieces(module: Any, *args: Any, **kwargs: Any) -> int:
        """Call a module attached, compare, and return in how many pieces that was."""
        wanted = module(*args, **kwargs)
        store.add("m", module)
        attached = store.attach(copy.deepcopy(module), "m@1")
        sizes.clear()
        torch.testing.assert_close(attached(*args, **kwargs), wanted)
        assert sum(sizes) == len(wanted)
        store.remove("m@1")
        return len(sizes)

    monkeypatch.setattr(nn.ReLU, "forward", noted)
    x = torch.randn(9_001, 80)  # 3 MB, with others beside it; 2 MiB are let in at a time
    with pydedup.open(tmp_path / "a.db", memory="8MiB") as store:
        assert pieces(net(), x) > 2
        assert pieces(net(), x[:1000]) == 1
        assert pieces(net(), x[:0]) == 1
        assert pieces(net(), x.reshape(9_001, 1, 80)) > 2
        assert pieces(net().double(), x.double()) > 4
        assert pieces(nn.Sequential(net(), nn.Softmax(1)).eval(), x) > 2
        images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        assert pieces(images, torch.randn(900, 1, 12, 12)) > 1
        # Rows that depend on each other, or of which that is not known.
        assert pieces(nn.Sequential(net(), nn.Softmax(0)).eval(), x) == 1
        assert pieces(Unknown(*net()).eval(), x) == 1
        assert pieces(net(), input=x) == 1
        store.add("m", net())
        module = store.attach(net(), "m")
        module[1].register_forward_hook(lambda *_: None)
        sizes.clear()
        module(x)
        assert sizes == [len(x)]


class Unknown(nn.Sequential):  # type: ignore[misc]
    """Computes as any such module does, as far as that can be known."""

    def forward(self, input: Any) -> Any:
        return super().forward(input)


def test_two_threads_load_a_tensor_once(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv3d(32, 64, 5)).eval()
    x = torch.randn(1, 32, 5, 5, 5)
    wanted = module(x)
    with pydedup.open(tmp_path / "small.db", memory="5MiB") as store:  # not enough for two
        store.add("m", module)
        store.attach(module, "m")
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda _: module(x), range(4)):
                assert torch.equal(got.detach(), wanted)


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
