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
from pydedup.errors import ArgumentError, BudgetError

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


def test_one_expert_at_a_time(
    tmp_path: Path, loaded: Callable[[Any], set[str]], check: Callable[..., set[str]]
) -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(5, 512, 130) / 8)

        def forward(self, x: Any) -> Any:
            some, few = torch.tensor([0, 3]), self.up[1:4]
            by_number = nn.functional.linear(x, self.up[2]), x @ self.up[-1].t(), few[-3]
            by_tensor = x @ self.up[torch.tensor(4)].t(), self.up[some], few[torch.tensor([2])]
            return *by_number, *by_tensor

    module, x = Looped().eval(), torch.randn(3, 130)
    with pydedup.open(tmp_path / "m.db", memory="2MiB") as store:
        store.add("m", module)
        attached = store.attach(copy.deepcopy(module), "m")
        for got, wanted in zip(attached(x), module(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert loaded(attached) == set()
    assert check(module, x) == {"up"}  # small enough to be kept
    with pytest.raises(IndexError):
        check(Beyond(), torch.randn(3, 130))


class Beyond(nn.Module):
    """Asks for an expert that there is not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 128, 128))

    def forward(self, x: Any) -> Any:
        return self.up[2] if self.up.requires_grad else self.up[-3]


def test_what_is_written_to_a_part_of_a_buffer_is_not_lost_unsaid(
    tmp_path: Path, check: Callable[..., set[str]]
) -> None:
    class Cached(nn.Module):
        def __init__(self, entries: int) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(entries, 128, 160))

        def forward(self, x: Any) -> Any:
            self.cache[0][3] = x
            return self.cache[0]

    with pytest.raises(ArgumentError, match="changed in place"):
        check(Cached(2), torch.randn(160))
    with pydedup.open(tmp_path / "m.db", memory="2MiB") as store:
        store.add("m", Cached(20))
        attached = store.attach(Cached(20).eval(), "m")
        with pytest.raises(BudgetError, match="'cache' of m@1 cannot be streamed"):
            attached(torch.randn(160))


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


def gpt_oss(**sizes: Any) -> Any:
    """Its matrices are the other way round, and have a bias each."""
    transformers = pytest.importorskip("transformers", "4.55")  # the first that has it
    config = transformers.GptOssConfig(**sizes, head_dim=16, num_local_experts=8)
    return transformers.GptOssForCausalLM(config)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
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
