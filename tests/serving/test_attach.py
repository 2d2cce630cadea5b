# SPDX-License-Identifier: Apache-2.0
"""Which modules can be attached to which models: tied weights, buffers, names, classes."""

from __future__ import annotations

import abc
import functools
from typing import Any, Generic, TypeVar

import pytest

import pydedup
from pydedup.errors import ArgumentError, NotFoundError

from .conftest import net

torch = pytest.importorskip("torch")
nn = torch.nn

pytestmark = pytest.mark.usefixtures("no_grad")


X = torch.randn(3, 80)


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


def test_a_tie_that_the_module_lost_is_told(store: pydedup.Store) -> None:
    """As within `accelerate.init_empty_weights`, of what files have one name for."""
    module = Tied().eval()
    store.add("m", {"embed.weight": module.embed.weight})
    module.head.weight = nn.Parameter(module.embed.weight.detach().clone())
    with pytest.raises(ArgumentError, match=r"missing.*: head\.weight; .*tie them in the module"):
        store.attach(module, "m")
    module.head.weight = module.embed.weight
    store.attach(module, "m")


def test_what_no_tie_explains_says_nothing_of_ties(store: pydedup.Store) -> None:
    store.add("m", {"embed.weight": torch.ones(90, 71)})
    with pytest.raises(ArgumentError) as caught:
        store.attach(Tied().eval(), "m")
    assert "tie them" not in str(caught.value)
    store.add("n", {"0.weight": torch.ones(2, 3)})
    with pytest.raises(ArgumentError) as caught:
        store.attach(nn.Sequential(nn.Linear(3, 2)).eval(), "n")
    assert "missing in the store: 0.bias" in str(caught.value)
    assert "tie them" not in str(caught.value)


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


class ExtraTensor(nn.Linear):
    def get_extra_state(self) -> Any:
        return torch.ones(2)

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError


def test_extra_state_that_is_a_tensor(store: pydedup.Store) -> None:
    """A module could be added, and not be attached to what it had become."""
    module = nn.Sequential(ExtraTensor(80, 5)).eval()
    store.add("m", module)
    assert torch.equal(store.load_torch("m")["0._extra_state"], torch.ones(2))
    wanted = module(X)
    torch.testing.assert_close(store.attach(module, "m")(X), wanted)
    assert "0._extra_state" in store.detach(module).state_dict()


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


def test_a_prefix_that_is_all_that_differs_is_told(store: pydedup.Store) -> None:
    """As what wraps modules, or has compiled them, gives their names one."""
    wrapped = nn.ModuleDict({"_orig_mod": nn.ModuleDict({"module": net()})}).eval()
    store.add("plain", net())
    store.add("wrapped", wrapped)
    message = r"begin with '_orig_mod\.module\.': give prefix='_orig_mod\.module\.'"
    with pytest.raises(ArgumentError, match=message):
        store.attach(net(), "wrapped")
    with pytest.raises(ArgumentError, match=r"give prefix='_orig_mod\.module\.'"):
        store.attach(net(), "wrapped", prefix="_orig_mod.")
    with pytest.raises(ArgumentError, match=r"attach its '_orig_mod\.module' instead"):
        store.attach(wrapped, "plain")
    store.attach(wrapped["_orig_mod"]["module"], "plain")
    store.attach(net(), "wrapped", prefix="_orig_mod.module.")


def test_a_module_with_adapters_that_the_model_has_not(store: pydedup.Store) -> None:
    """As peft puts them around a layer: a list of names does not say what to do."""
    plain = net()
    layer = nn.ModuleDict({"base_layer": plain[0], "lora_A": nn.Linear(80, 4, bias=False)})
    adapted = nn.Sequential(layer, plain[2]).eval()
    store.add("m", {name.replace("2.", "1."): part for name, part in plain.state_dict().items()})
    with pytest.raises(ArgumentError, match=r"adapters of peft.*store\.add\(name, module\)"):
        store.attach(adapted, "m")
    report = store.add("adapted", adapted)
    assert report.shared_blocks == report.blocks - 1
    store.attach(adapted, "adapted")


def test_a_module_without_weights(store: pydedup.Store) -> None:
    """As a part may be of one that is attached piece by piece."""
    store.add("m", net())
    module = store.attach(nn.ReLU().eval(), "m", prefix="between.")
    assert torch.equal(module(X), X.relu())
    with pytest.raises(ArgumentError, match="is attached to m already"):
        store.attach(module, "m")
    assert type(store.detach(module)) is nn.ReLU


def test_a_module_without_weights_for_a_model_that_has_some(store: pydedup.Store) -> None:
    """It was an IndexError."""
    store.add("m@1", net())
    with pytest.raises(ArgumentError, match=r"m@1 does not fit ReLU: not in the module: \S+, "):
        store.attach(nn.ReLU().eval(), "m@1")


def test_an_unknown_model(store: pydedup.Store) -> None:
    store.add("m", net())
    for name in ("x", "m@2"):
        with pytest.raises(NotFoundError):
            store.attach(net(), name)


def test_a_part_in_two_places(store: pydedup.Store) -> None:
    part = nn.Linear(80, 80)
    module = nn.Sequential(part, nn.ReLU(), part).eval()
    wanted = module(X)
    store.add("m", module)
    store.attach(module, "m")
    torch.testing.assert_close(module(X), wanted)
    store.detach(module)
    assert type(part) is nn.Linear
    assert module[2] is part
    assert torch.equal(module(X), wanted)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_modules_that_cannot_be_attached(store: pydedup.Store) -> None:
    module = net()
    store.add("m", module)
    module[1].train()
    with pytest.raises(ArgumentError, match=r"in training mode \(1\): call module.eval\(\) first"):
        store.attach(module, "m")
    with pytest.raises(ArgumentError, match=r"takes a torch.nn.Module, not dict"):
        store.attach({}, "m")  # type: ignore[type-var]
    with pytest.raises(ArgumentError, match="prefix must be a text"):
        store.attach(net(), "m", prefix=b"body.")  # type: ignore[arg-type]
    lazy = nn.LazyLinear(5).eval()
    with pytest.raises(ArgumentError, match="'weight' has no shape before the module is called"):
        store.attach(lazy, "m")
    for given in (
        torch.eye(5).to_sparse(),
        torch.quantize_per_tensor(torch.ones(5), 1, 0, torch.qint8),
    ):
        odd = net()
        odd.register_buffer("odd", given)
        with pytest.raises(ArgumentError, match="only plain dense tensors can be attached"):
            store.attach(odd, "m")
    module.eval()
    outer = nn.Sequential(store.attach(module, "m")).eval()
    for again in (module, outer):
        with pytest.raises(ArgumentError, match="is attached to m already; detach it first"):
            store.attach(again, "m")


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


class AtMostOne(type):
    def __new__(cls, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> Any:
        if any(isinstance(base, AtMostOne) for base in bases):
            raise bases[-1].error("no more of them")  # type: ignore[attr-defined]
        return super().__new__(cls, name, bases, names)


class Last(nn.Linear, metaclass=AtMostOne):
    error = TypeError


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_a_class_that_cannot_be_replaced(
    store: pydedup.Store, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr(Last, "error", error)
    module = nn.Sequential(nn.Linear(80, 70), Last(70, 5)).eval()
    wanted = module(X)
    store.add("m", module)
    with pytest.raises(ArgumentError, match="a Last cannot be attached: no more"):
        store.attach(module, "m")
    assert [type(part) for part in module.modules()] == [nn.Sequential, nn.Linear, Last]
    assert torch.equal(module(X), wanted)


class Slotted:
    __slots__ = ()


T = TypeVar("T")


@pytest.mark.parametrize("before", [(), (abc.ABC,), (Generic[T],), (Slotted,)], ids=repr)
def test_a_class_that_keeps_account_of_its_subclasses(store: pydedup.Store, before: Any) -> None:
    """It had the class of attached modules among them, by the name of what that stands in for.

    What stands before ``nn.Module`` and has no ``__dict__`` could not be attached at all.
    """
    known: dict[str, type] = {}

    class Kept(*before, nn.Module):  # type: ignore[misc]
        def __init_subclass__(cls, *, size: int) -> None:
            known[cls.__name__] = cls

    class Own(Kept, size=5):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(80, 5)

        def forward(self, x: Any) -> Any:
            return self.layer(x)

        def __call__(self, x: Any) -> Any:
            return super().__call__(x) + 1

    module, wanted = Own().eval(), Own().eval()
    store.add("m", wanted)
    torch.testing.assert_close(store.attach(module, "m")(X), wanted(X))
    assert known == {"Own": Own}
    with pytest.raises(ArgumentError, match=r"Own, attached to m, has no state_dict"):
        module.state_dict()
    with pytest.raises(TypeError, match="size"):

        class WithoutSize(type(module)):
            pass

    assert type(store.detach(module)) is Own


class KeptTwice(nn.Module):
    def __init__(self, keep: Any) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(80, 5), nn.BatchNorm1d(5)
        self.kept = keep(self)

    def forward(self, x: Any) -> Any:
        return self.layer(x)


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("layer.weight", lambda m: [m.layer.weight]),
        ("layer.bias", lambda m: {"weights": ({"bias": m.layer.bias},)}),
        ("layer.weight", lambda m: functools.partial(nn.functional.linear, weight=m.layer.weight)),
        ("norm.running_mean", lambda m: (1, "two", [m.norm.running_mean])),
    ],
)
def test_a_tensor_that_is_kept_elsewhere_as_well_is_told(
    store: pydedup.Store, name: str, keep: Any
) -> None:
    """It stayed what it was there, and such a module computed with that, without a word."""
    module = nn.Sequential(KeptTwice(keep)).eval()
    store.add("m", module)
    with pytest.raises(ArgumentError, match=rf"keeps '0\.{name}' in '0\.kept' as well"):
        store.attach(module, "m")
    assert type(module) is nn.Sequential
    wanted = module(X)
    circle: list[Any] = [torch.zeros(3)]
    circle.append(circle)
    module[0].kept = circle
    torch.testing.assert_close(store.attach(module, "m")(X), wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantised_modules_are_refused(store: pydedup.Store) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}).eval()
    store.add("m", net())
    with pytest.raises(ArgumentError, match=r"is no tensor of a module but a .*quantised"):
        store.attach(quantised, "m")
