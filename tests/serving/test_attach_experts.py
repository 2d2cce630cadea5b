# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts, attached: larger than the budget, they are read piece by piece."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pydedup
from pydedup.errors import ArgumentError

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
nn = torch.nn

#: Of five experts; nothing is of the second and the last, nor are the rows behind them of any.
ENDS = torch.tensor([3, 3, 10, 12, 12], dtype=torch.int32)
ROWS = 12


class Experts(nn.Module):
    """Multiplies groups of rows with a matrix each."""

    def __init__(self, shape: tuple[int, int, int], turned: bool) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(shape) / 8)
        self.turned = turned

    def forward(self, x: Any, ends: Any = ENDS) -> Any:
        matrices = self.matrices.transpose(-2, -1) if self.turned else self.matrices
        return torch._grouped_mm(x, matrices, offs=ends)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    torch.manual_seed(7)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [(5, 656, 104), (5, 104, 656), (200, 32, 104), (5, 640, 160), (5, 200, 656), (30, 130, 160)],
)
def test_experts_that_are_not_loaded(
    tmp_path: Path,
    loaded: Callable[[Any], set[str]],
    shape: tuple[int, int, int],
    dtype: Any,
    turned: bool,
) -> None:
    module = Experts(shape, turned).to(dtype).eval()
    matrices = module.matrices.mT if turned else module.matrices
    x = torch.randn(ROWS + 2, matrices.shape[1], dtype=dtype)
    ends = ENDS if shape[0] == len(ENDS) else torch.arange(shape[0], dtype=torch.int32) // 17
    starts = [0, *ends.tolist()]
    wanted = torch.cat([x[a:b] @ w for a, b, w in zip(starts, ends, matrices, strict=False)])
    with pydedup.open(tmp_path / "m.db", memory="2MiB") as store:
        store.add("m", module)
        attached = store.attach(copy.deepcopy(module), "m")
        rows = len(wanted)
        for _ in range(2):
            rtol = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
            got = attached(x, ends)
            assert got.dtype is dtype
            torch.testing.assert_close(got[:rows], wanted, rtol=rtol, atol=rtol)
        assert got.shape[0] == len(x)
        assert loaded(attached) == set()
        assert attached(x[:0], ends * 0).shape == (0, matrices.shape[2])
        with torch.enable_grad(), pytest.raises(ArgumentError, match="requires a gradient"):
            attached(x.clone().requires_grad_(), ends)
        assert torch.equal(store.detach(attached).matrices, module.matrices)


@pytest.mark.parametrize("turned", [False, True])
def test_only_the_experts_that_are_asked_are_read(tmp_path: Path, turned: bool) -> None:
    module = Experts((32, 256, 384), turned).eval()
    x = torch.randn(6, 384 if turned else 256)
    ends = torch.zeros(32, dtype=torch.int32)
    ends[3:], ends[20:] = 4, 6  # the fourth, and the one behind the twentieth
    with pydedup.open(tmp_path / "m.db") as store:
        store.add("m", module, policy=pydedup.policies.Exact())
    with pydedup.open(tmp_path / "m.db", memory="8MiB") as store:
        attached = store.attach(copy.deepcopy(module), "m")
        torch.testing.assert_close(attached(x, ends), module(x, ends), rtol=1e-4, atol=1e-4)
        pool, pages = store.stats().pool, store.stats().pages
        assert pages >= 10
        assert pool["inserts"] <= 4


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(5, 640, 160), (5, 200, 656)])
def test_experts_in_float64_of_stored_float32(
    tmp_path: Path, shape: tuple[int, int, int], turned: bool
) -> None:
    """Nothing is rounded to float32 but what was stored."""
    module = Experts(shape, turned).eval()
    with pydedup.open(tmp_path / "m.db", memory="2MiB") as store:
        store.add("m", module)
        module.double()
        x = torch.randn(ROWS, shape[2] if turned else shape[1], dtype=torch.float64)
        matrices = module.matrices.mT if turned else module.matrices
        starts = [0, *ENDS.tolist()]
        wanted = torch.cat([x[a:b] @ w for a, b, w in zip(starts, ENDS, matrices, strict=False)])
        got = store.attach(module, "m")(x)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


class Looped(nn.Module):
    """Uses its matrices one by one, and parts of them, in the ways of models."""

    def __init__(self, experts: int = 5) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, 512, 130) / 8)

    def forward(self, x: Any) -> Any:
        linear, up, wide = nn.functional.linear, self.up, x.repeat(1, 4)[:, :512]
        few, turned, some = up[1:4], up.mT, torch.tensor([0, 3])
        products = [
            linear(x, up[2]),
            linear(x, up[torch.tensor(4)], wide[0]),
            linear(wide, turned[1], x[0]),
            linear(x.bfloat16().float(), up.select(0, 0)),
            (x.mT[:1].mT @ turned[3][:1], up[-1] @ x[0], x[0] @ up[1].t(), up[0].mT @ wide.t()),
            (wide @ few[-3], wide @ up[-1].contiguous().detach(), torch.mm(wide, few[1])),
            torch.addmm(x[0], wide, up[3]),
            (linear(x, up[2][70:300]), wide[:, 70:300] @ up[2, 70:300], linear(x, up[3][:1])),
            (wide[:, :64] @ up[1][64:128], wide[:, :9] @ up[1].split([500, 3, 9])[2]),
            tuple(x @ part for part in up[1].mT.reshape(130, 4, 128).unbind(1)),
            tuple(linear(x, matrix) for matrix in up),
            tuple(linear(x, matrix) for matrix in turned.mT.unbind()),
            torch.bmm(x.repeat(len(up), 1, 1), turned),
            wide.repeat(len(few), 1, 1) @ few,
        ]
        rows = [
            *(few[-3], up[some], few[torch.tensor([2])], up[1][7], up[-1, -1], up[0][some]),
            *(up[2][5:90][some - 3], up[1, :, 3], up[0, ..., None], turned[1][2], turned[0, 3:]),
            nn.functional.embedding(some, up[4]),
            nn.functional.embedding_bag(some[None], up[4]),
            *(up[1] + up[2], up[0].clone(), up[3].sum(), torch.tensor(up[3].shape), len(up[1])),
        ]
        return *products, *rows


def test_one_expert_at_a_time(
    tmp_path: Path, loaded: Callable[[Any], set[str]], check: Callable[..., set[str]]
) -> None:
    module, x = Looped().eval(), torch.randn(3, 130)
    with pydedup.open(tmp_path / "m.db", memory="2MiB") as store:
        store.add("m", module)
        attached = store.attach(copy.deepcopy(module), "m")
        torch.testing.assert_close(attached(x), module(x), rtol=1e-4, atol=1e-4)
        assert loaded(attached) == set()
        with torch.inference_mode():
            torch.testing.assert_close(attached(x), module(x), rtol=1e-4, atol=1e-4)
        for dtype in (torch.float64, torch.bfloat16):
            single = Looped().to(dtype).eval()
            single.forward = lambda x, up=single.up: (up[1] @ x[0], x @ up[2].t(), up[3].t()[:, 9])
            store.add("s", single, policy=pydedup.policies.Exact())
            wanted = single(x.to(dtype))
            single = store.attach(single, "s")
            single.forward = lambda x, one=single: (
                one.up[1] @ x[0],
                x @ one.up[2].t(),
                one.up[3].t()[:, 9],
            )
            torch.testing.assert_close(single(x.to(dtype)), wanted)
    assert check(module, x) == set()  # also where it would fit
    for index in (2, -3, (5, 1), torch.tensor(7)):
        module = Looped(2)
        module.forward = lambda x, one=module, index=index: one.up[index]
        with pytest.raises(IndexError):
            check(module, x)


def test_a_stack_of_four_axes(tmp_path: Path, loaded: Callable[[Any], set[str]]) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.Parameter(torch.randn(3, 2, 130, 140) / 8)

        def forward(self, x: Any) -> Any:
            first, last, turned = self.all[0], self.all[-1][1], self.all[1].mT
            outer = (first @ x.t(), torch.bmm(x.repeat(2, 1, 1), turned), x @ last.t())
            some = torch.tensor([1, 0])
            return *outer, self.all[2, 1, 5], self.all[1:][1][1:][0][4:9], first[some], last[some]

    module, x = Layers().eval(), torch.randn(3, 140)
    with pydedup.open(tmp_path / "m.db", memory="2MiB") as store:
        store.add("m", module)
        attached = store.attach(copy.deepcopy(module), "m")
        torch.testing.assert_close(attached(x), module(x), rtol=1e-4, atol=1e-4)
        assert loaded(attached) == set()


@pytest.mark.parametrize("is_buffer", [False, True])
@pytest.mark.parametrize("experts", [2, 20])
@pytest.mark.parametrize(
    "change",
    [
        lambda w, x: w[1].mul_(2),
        lambda w, x: w[torch.tensor(1)].copy_(x),
        lambda w, x: w[1].mT.add_(1),
        lambda w, x: w[0].__setitem__(3, x[0]),
        lambda w, x: w[0, 3].add_(1),
        lambda w, x: w[0][3:9].zero_(),
        lambda w, x: w.unbind()[1].data.fill_(2),
        lambda w, x: torch.add(x, x, out=w[1]),
        lambda w, x: nn.functional.relu(w[0], inplace=True),
        lambda w, x: w[0].__iadd__(1),
        lambda w, x: w[0].numpy().__setitem__(0, 1),
    ],
)
def test_what_is_written_to_an_entry_is_not_lost_unsaid(
    tmp_path: Path, change: Callable[[Any, Any], Any], experts: int, is_buffer: bool
) -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            cache = torch.zeros(experts, 128, 160)
            if is_buffer:
                self.register_buffer("cache", cache)
            else:
                self.cache = nn.Parameter(cache)

        def forward(self, x: Any, change: Any = None) -> Any:
            if change is not None:
                change(self.cache, x)
            return self.cache[0] + x

    x = torch.randn(128, 160)
    with pydedup.open(tmp_path / "m.db", memory="2MiB") as store:
        store.add("m", Changed())
        attached = store.attach(Changed().eval(), "m")
        expected = ValueError if "numpy" in change.__code__.co_names else ArgumentError
        with pytest.raises(expected, match=r"in a store and cannot be changed|read-only"):
            attached(x, change)
        assert torch.equal(attached(x), x)


def test_infinite_neighbours_do_not_matter(tmp_path: Path) -> None:
    """Blocks at the end of an expert hold rows of the next one, too."""
    module = Experts((3, 200, 656), turned=False).eval()
    module.matrices[1] = float("inf")
    x = torch.randn(4, 200)
    ends = torch.tensor([2, 2, 4], dtype=torch.int32)
    with pydedup.open(tmp_path / "m.db", memory="2MiB") as store:
        store.add("m", module)
        attached = store.attach(copy.deepcopy(module), "m")
        torch.testing.assert_close(attached(x, ends), module(x, ends), rtol=1e-4, atol=1e-4)


def test_experts_of_a_small_model_are_loaded(check: Callable[..., set[str]]) -> None:
    for turned in (False, True):
        module = Experts((5, 64, 64), turned)
        assert check(module, torch.randn(ROWS, 64)) == {"matrices"}


def test_experts_of_a_model_that_fits_are_streamed_as_well(check: Callable[..., set[str]]) -> None:
    """Attached variants have the blocks that they share in memory once."""
    for turned in (False, True):
        assert check(Experts((5, 128, 128), turned), torch.randn(ROWS, 128)) == set()


def mixtral(**sizes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(**sizes, num_local_experts=8)
    return transformers.MixtralForCausalLM(config)


def mixtral_one_by_one(**sizes: Any) -> Any:
    """Its experts are called in a loop, with ``W[i]``."""
    model = mixtral(**sizes)
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("a release of transformers that has one way to call experts")
    model.set_experts_implementation("eager")
    return model


def llama4(**sizes: Any) -> Any:
    """All of its experts are called at once, with ``bmm``."""
    transformers = pytest.importorskip("transformers", "4.55")
    hidden = sizes["intermediate_size"]
    config = transformers.Llama4TextConfig(
        **sizes, intermediate_size_mlp=hidden, head_dim=32, num_local_experts=8, pad_token_id=0
    )
    return transformers.Llama4ForCausalLM(config)


def gpt_oss(**sizes: Any) -> Any:
    """Its matrices are the other way round, and have a bias each."""
    transformers = pytest.importorskip("transformers", "4.55")  # the first that has it
    config = transformers.GptOssConfig(**sizes, head_dim=16, num_local_experts=8)
    return transformers.GptOssForCausalLM(config)


@pytest.mark.parametrize("make", [mixtral, mixtral_one_by_one, gpt_oss, llama4])
def test_a_model_whose_experts_exceed_the_budget(
    tmp_path: Path, loaded: Callable[[Any], set[str]], make: Callable[..., Any]
) -> None:
    model = make(
        vocab_size=200,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    ).eval()
    ids = torch.randint(3, 200, (2, 9))
    with pydedup.open(tmp_path / "m.db", memory="6MiB") as store:
        assert store.add("m", model).logical_bytes > 6 << 20
        attached = store.attach(copy.deepcopy(model), "m")
        for given in (ids, ids[:1, :1]):
            wanted = model(given).logits
            torch.testing.assert_close(attached(given).logits, wanted, rtol=1e-3, atol=1e-3)
        assert not [name for name in loaded(attached) if name.endswith("_proj")]
        assert store.stats().pool["bytes"] <= 6 << 20


def test_views_of_three_axes(check: Callable[..., set[str]]) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filters = nn.Parameter(torch.randn(6, 3, 5))

        def forward(self, x: Any) -> Any:
            turned = self.filters.mT
            shapes = torch.tensor([*turned.shape, *turned.stride(), turned.is_contiguous()])
            return (
                shapes,
                nn.functional.conv1d(x, turned),
                turned[1:3],
                self.filters[1:3].transpose(1, 2),
                turned.transpose(2, 1)[torch.tensor([0, 5])],
                self.filters.transpose(0, 1),
            )

    assert check(Turned(), torch.randn(2, 5, 9)) == {"filters"}


def test_experts_of_a_file_that_are_one_tensor_in_the_module(tmp_path: Path) -> None:
    """As transformers 5 saves them: a list of names does not say what to do."""
    module = nn.ModuleDict({"experts": nn.ModuleDict({"up": Experts((2, 128, 128), False)})}).eval()
    matrices = module["experts"]["up"].matrices.numpy()
    saved = {f"experts.{number}.up.weight": matrix for number, matrix in enumerate(matrices)}
    with pydedup.open(tmp_path / "m.db") as store:
        store.add("m", saved)
        with pytest.raises(ArgumentError, match=r"add the module, store\.add\(name, module\)"):
            store.attach(module, "m")
        report = store.add("m", module)
        assert report.shared_blocks == report.blocks
        store.attach(module, "m")
        with pytest.raises(ArgumentError, match="not in the module") as caught:
            store.attach(nn.Linear(3, 3).eval(), "m@1")
        assert "add the module" not in str(caught.value)
