# SPDX-License-Identifier: Apache-2.0
"""What an attached module refuses, and what it allows."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, BudgetError

from .conftest import net

torch = pytest.importorskip("torch")
nn = torch.nn
bag = nn.functional.embedding_bag

pytestmark = pytest.mark.usefixtures("no_grad")


X = torch.randn(3, 80)


BIAS = torch.randn(70)
linear = nn.functional.linear


def forward_mode(module: Any) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return module(torch.autograd.forward_ad.make_dual(X, X))


def bias_in_forward_mode(module: Any) -> Any:
    with torch.autograd.forward_ad.dual_level():
        bias = torch.autograd.forward_ad.make_dual(BIAS, BIAS)
        return linear(X, module[0].weight, bias)


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
    "a dual bias": (bias_in_forward_mode, "the bias of '0.weight' of m has a tangent"),
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
    "float64": (lambda m: m(X.double()), "is torch.float64, and the weight torch.float32"),
    "bf16": (lambda m: X.bfloat16() @ m[0].weight.T, "is torch.bfloat16, and the weight"),
    "a bias in float64": (
        lambda m: linear(X, m[0].weight, BIAS.double()),
        "the bias of '0.weight' of m is torch.float64, and the weight torch.float32",
    ),
    "a bias of rows in float64": (
        lambda m: linear(X, m[0].weight[:9], BIAS[:9].double()),
        "the bias of '0.weight' of m is torch.float64",
    ),
    "a bias elsewhere": (lambda m: linear(X, m[0].weight, BIAS.to("meta")), "the bias is on meta"),
    "padding": (
        lambda m: bag(IDS[None].abs(), m[0].weight, padding_idx=70),
        "padding_idx 70 is none of the 70 rows",
    ),
    "offsets beyond the ids": (
        lambda m: bag(IDS.abs(), m[0].weight, torch.tensor([0, 9]), padding_idx=0),
        "offsets must begin with 0, ascend and stay within the 2 ids",
    ),
    "ids without offsets": (
        lambda m: bag(IDS.abs(), m[0].weight, padding_idx=0),
        "ids of rank 1 without offsets",
    ),
    "factors": (
        lambda m: bag(
            IDS[None].abs(),
            m[0].weight,
            mode="sum",
            per_sample_weights=torch.ones(3),
            padding_idx=0,
        ),
        r"weights have shape \(3,\); that of ids, \(1, 2\), is needed",
    ),
    "shape": (
        lambda m: m(X[:, :9]),
        r"'0.weight' of m, of shape \(70, \d+\), does not take an input of shape \(3, 9\): its",
    ),
    "device": (lambda m: m(X.to("meta")), "the input is on meta"),
    "sparse": (lambda m: m(X.to_sparse()), "is no plain tensor in memory"),
    "vmap": (lambda m: torch.vmap(m)(X), "cannot be part of what torch.func transforms"),
    "jvp": (lambda m: torch.func.jvp(m, (X,), (X,)), "cannot be part of what torch.func"),
    "vmap of a bias": (
        lambda m: torch.vmap(lambda b: linear(X, m[0].weight, b))(BIAS[None]),
        "bias of '0.weight' of m is no plain tensor",
    ),
    "vmap of a part": (
        lambda m: torch.vmap(lambda x: linear(x, m[0].weight))(X),
        "is no plain tensor in memory",
    ),
    "functionalize": (  # numpy() of its wrappers gave whatever was in memory
        lambda m: torch.func.functionalize(lambda x: linear(x, m[0].weight))(X),
        "is no plain tensor in memory",
    ),
}


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


@pytest.mark.parametrize(
    ("layer", "shape", "why"),
    [
        (nn.Conv2d(3, 8, 3), (1, 4, 9, 9), "x has 4 channels"),
        (nn.Conv2d(3, 8, 3), (3, 9), r"it must be \(batch, channels, height, width\), or"),
        (nn.Conv2d(3, 8, 3), (1, 3, 2, 9), "the kernel covers 3 of the image's height"),
        (nn.Conv1d(3, 8, 3), (1, 4, 9), "x has 4 channels"),
        (nn.Conv1d(3, 8, 3), (9,), r"it must be \(batch, channels, length\), or without batch"),
    ],
)
def test_images_that_do_not_fit(
    store: pydedup.Store, layer: nn.Module, shape: tuple[int, ...], why: str
) -> None:
    """Which weight it was, and of what shape, was not said."""
    store.add("m", layer)
    weight, given = re.escape(str(tuple(layer.weight.shape))), re.escape(str(shape))
    told = f"'weight' of m, of shape {weight}, does not take an input of shape {given}: {why}"
    with pytest.raises(ArgumentError, match=told):
        store.attach(layer.eval(), "m")(torch.zeros(shape))


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


def test_gradients_of_a_bias_of_ones_own_are_refused(store: pydedup.Store) -> None:
    """There were none, without a word: training such a bias changed nothing."""
    convolution, x = nn.Conv1d(80, 5, 1).eval(), X[..., None]
    for name, module, given in (("m", net(), X), ("c", nn.Sequential(convolution).eval(), x)):
        store.add(name, module)
        store.attach(module, name)
        module[-1].bias = nn.Parameter(torch.zeros(5))
        assert not module(given).requires_grad
        with (
            torch.enable_grad(),
            pytest.raises(ArgumentError, match=r"the bias of .* requires a gr"),
        ):
            module(given)


def test_running_statistics_are_not_updated(store: pydedup.Store) -> None:
    module = nn.Sequential(nn.BatchNorm1d(80)).eval()
    store.add("m", module)
    store.attach(module, "m")
    module[0].training = True
    with pytest.raises(ArgumentError, match="is in training mode"):
        module(X)
    x, layer = torch.randn(2, 80, 5), module[0]
    with pytest.raises(ArgumentError, match=r"'0\.running_mean' of m cannot be updated"):
        nn.functional.instance_norm(x, layer.running_mean, layer.running_var)


def test_fake_tensors_are_refused(store: pydedup.Store) -> None:
    """What was loaded for them was fake, and stayed: the module was of no use from then on."""
    from torch._subclasses import FakeTensorMode

    module = net()
    store.add("m", module)
    wanted = module(X)
    store.attach(module, "m")
    with FakeTensorMode(allow_non_fake_inputs=True):
        for use in (lambda: module(X), lambda: module[2].bias + 1, lambda: module[0].weight + 1):
            with pytest.raises(ArgumentError, match="cannot be run with fake tensors"):
                use()
    torch.testing.assert_close(module(X), wanted)


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
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":  # before, nothing from DLPack is writable
        np.from_dlpack(bias)[:] = 9
    torch.from_dlpack(bias).fill_(9)
    torch.testing.assert_close(module(X), wanted)


def test_another_dtype_is_told_by_that_of_the_results(store: pydedup.Store) -> None:
    """A norm counts its batches in int64, and that is what the module was said to return."""
    module = nn.BatchNorm1d(4).eval()
    for dtype in (torch.int8, torch.int16, torch.int32, torch.bool):
        module.register_buffer(f"buffer {dtype}".replace(".", " "), torch.zeros(1, dtype=dtype))
    store.add("m", module)
    with pytest.raises(ArgumentError, match=r"torch.float32 on meta: .* returns torch.float32"):
        store.attach(module, "m").to("meta")


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


def test_an_input_that_no_memory_holds(store: pydedup.Store) -> None:
    """A view of one element claims any size. It was said to be sparse, nested, or of a tracer."""
    module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)).eval()
    store.add("m", module)
    store.attach(module, "m")
    ids, x = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    with pytest.raises(BudgetError, match=r"of the [a-z]+ of .0.weight. of m: torch.int64 of"):
        module[0](ids.expand(1 << 45))
    with pytest.raises(BudgetError, match=r"copy of the input of '1.weight' of m: torch.float32"):
        module[1](x.expand(1 << 45, 4))


def test_ids_that_are_no_plain_tensor_are_refused(store: pydedup.Store) -> None:
    module = nn.Embedding(9, 4).eval()
    store.add("m", module)
    store.attach(module, "m")
    ids = torch.arange(6).view(2, 3)
    for given in (ids.to("meta"), ids.to_sparse()):
        with pytest.raises(ArgumentError, match="input of 'weight' of m is no plain tensor"):
            module(given)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_ids_of_a_dtype_that_torch_refuses(store: pydedup.Store, kind: Any) -> None:
    """A module that served with int16 failed once it was detached; floats had the table loaded."""
    module = kind(9, 4).eval()
    store.add("m", module)
    wanted = module(torch.arange(6).view(2, 3))
    store.attach(module, "m")
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.bool, torch.float32):
        ids = torch.arange(6).view(2, 3).to(dtype)
        with pytest.raises(ArgumentError, match=rf"ids of 'weight' of m are {dtype}; int32 or int"):
            module(ids)
    for what, kind_of_it in (("x", "str"), (np.arange(6).reshape(2, 3), "ndarray")):
        with pytest.raises(ArgumentError, match=rf"ids of 'weight' of m are a {kind_of_it}; a ten"):
            module(what)
    torch.testing.assert_close(module(torch.arange(6, dtype=torch.int32).view(2, 3)), wanted)
