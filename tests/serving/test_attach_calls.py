# SPDX-License-Identifier: Apache-2.0
"""Calls of attached layers as torch takes them: arguments, parts of matrices, dtypes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.blocks import BlockMap
from pydedup.errors import ArgumentError

torch = pytest.importorskip("torch")
nn = torch.nn

Check = Callable[..., set[str]]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


class Calls(nn.Module):
    """A function of the input and a matrix."""

    def __init__(self, call: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(70, 50))
        self.call = call

    def forward(self, x: Any) -> Any:
        return self.call(x, self.matrix)


linear, bag = nn.functional.linear, nn.functional.embedding_bag


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: torch.mm(x, mat2=w.t()),
        lambda x, w: x.matmul(other=w.t()),
        lambda x, w: x @ torch.t(input=w),
        lambda x, w: w @ x.t(),
        lambda x, w: w @ x[0],
        lambda x, w: torch.mm(w, x.t()),
        lambda x, w: x @ torch.transpose(input=w, dim0=-1, dim1=0),
        lambda x, w: x @ w.transpose(1, -2),
        lambda x, w: linear(x, torch.chunk(input=w, chunks=2)[1]),
        lambda x, w: linear(x, w.contiguous(memory_format=torch.contiguous_format)),
        lambda x, w: linear(x.type_as(other=w), w),
        lambda x, w: linear(x.type(torch.float32), w.type(torch.float32)),
        lambda x, w: linear(x.type(w.type()), w.type(dtype=w.type())),
        lambda x, w: linear(x, w, torch.ones(1)),
        lambda x, w: linear(x[0], w, torch.ones(())),
        lambda x, w: linear(x, w[3:9], torch.ones(1)),
        lambda x, w: bag(torch.tensor([[0, 69], [3, 3]]), w, padding_idx=-1),
        lambda x, w: [linear(x, part) for part in w.chunk(3)],
        lambda x, w: linear(x, w[10:60][5:9]),
    ],
)
def test_arguments_as_torch_takes_them(check: Check, call: Callable[[Any, Any], Any]) -> None:
    assert check(Calls(call), torch.randn(4, 50)) == set()


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: torch.mm(x, w.t(), out=x.new_empty(4, 70)),
        lambda x, w: torch.matmul(x, w.t(), out=x.new_empty(4, 70)),
        lambda x, w: torch.addmm(x.new_ones(70), x, w.t(), out=x.new_empty(4, 70)),
        lambda x, w: torch.addmm(x.new_ones(70), x, w.t(), beta=0.5),
        lambda x, w: torch.addmm(x.new_ones(70), x, w.t(), alpha=0.5),
        lambda x, w: linear(x, w, torch.ones(4, 70)),
        lambda x, w: bag(torch.tensor([[0, 5], [3, 3]]), w[2:8]),
        lambda x, w: bag(torch.tensor([[0, 49], [3, 3]]), w.t()),
        lambda x, w: x @ w.t().contiguous().view(-1).view(50, 70),
        lambda x, w: linear(x, w.transpose(0, -2)),
    ],
)
def test_arguments_that_no_kernel_takes(check: Check, call: Callable[[Any, Any], Any]) -> None:
    assert check(Calls(call), torch.randn(4, 50)) == {"matrix"}


class SomeFilters(nn.Module):
    """Convolves with the first filters alone, as networks of several widths do."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        call = nn.functional.conv2d if x.ndim == 4 else nn.functional.conv1d
        return call(x, self.layer.weight[1:5], self.layer.bias[1:5])


class LastRows(nn.Module):
    """Multiplies with the end of a matrix, which no block height divides."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(997, 50))

    def forward(self, x: Any) -> Any:
        return linear(x, self.matrix[-5:])


def test_the_last_rows_of_a_matrix(check: Check) -> None:
    assert check(LastRows(), torch.randn(4, 50)) == set()


def test_a_matrix_that_is_cut_at_each_length(tmp_path: Path) -> None:
    """Of each length a block map was kept as long as the module, and counted nowhere."""
    module = Calls(lambda x, w: torch.stack([linear(x, w[:n]).sum() for n in range(1, 71)])).eval()
    x = torch.randn(4, 50)
    with torch.no_grad(), pydedup.open(tmp_path / "cut.db") as store:
        store.add("m", module)
        wanted = module(x)
        store.attach(module, "m")
        gc.collect()
        before = _block_maps()
        torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-3)
        gc.collect()
        assert _block_maps() <= before + 2


def _block_maps() -> int:
    """Return how many there are."""
    return sum(type(one) is BlockMap for one in gc.get_objects())


def test_convolutions_with_some_of_the_filters(check: Check) -> None:
    check(SomeFilters(nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 9, 9))
    check(SomeFilters(nn.Conv1d(3, 8, 3)), torch.randn(2, 3, 9))


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda x, w: w[3:9][torch.tensor([0, 6])], ArgumentError, "ids from 0 to 6 for 6 rows of"),
        (lambda x, w: w[torch.tensor([3, -71])], ArgumentError, "id -71 is out of range"),
        (lambda x, w: w.split([30, 30]), RuntimeError, "sum exactly to 70"),
        (lambda x, w: w.split([-1, 71]), RuntimeError, "non-negative"),
        (lambda x, w: w.split(0), RuntimeError, "can only be 0"),
        (lambda x, w: w.chunk(0), RuntimeError, "greater than 0"),
        (lambda x, w: linear(x, w[3:9], torch.ones(5)), RuntimeError, "must match"),
    ],
)
def test_parts_of_a_matrix_that_do_not_fit(
    store: pydedup.Store, call: Callable[[Any, Any], Any], error: type[Exception], said: str
) -> None:
    module = Calls(call).eval()
    store.add("m", module.state_dict())
    with torch.no_grad(), pytest.raises(error, match=said):
        store.attach(module, "m")(torch.randn(4, 50))


@pytest.mark.parametrize("axes", [(0, 3), (-3, 0), (1, 2)])
def test_axes_that_a_matrix_has_not(store: pydedup.Store, axes: tuple[int, int]) -> None:
    module = Calls(lambda x, w: w.transpose(*axes)).eval()
    store.add("m", module.state_dict())
    with torch.no_grad(), pytest.raises(IndexError, match="out of range"):
        store.attach(module, "m")(torch.randn(4, 50))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(check: Check, dtype: Any) -> None:
    rtol = 1e-9 if dtype == torch.float64 else 2e-2
    net = nn.Sequential(nn.Linear(60, 70), nn.GELU(), nn.LayerNorm(70), nn.Linear(70, 9)).to(dtype)
    assert check(net, torch.randn(4, 60, dtype=dtype), rtol=rtol) == set()
    check(nn.Conv2d(3, 5, 3, dtype=dtype), torch.randn(2, 3, 8, 8, dtype=dtype), rtol=rtol)
    check(nn.Embedding(60, 7, dtype=dtype), torch.arange(60), rtol=0)
    check(nn.EmbeddingBag(60, 7, dtype=dtype), torch.arange(60).view(6, 10), rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_bits_are_the_same_wherever_pages_are(store: pydedup.Store, dtype: Any, bias: bool) -> None:
    net = nn.Linear(300, 130, bias=bias, dtype=dtype).eval()
    for number in range(3):  # in the same pages
        store.add(f"m{number}", {k: v + number for k, v in net.state_dict().items()})
    x = torch.randn(2, 3, 300, dtype=dtype)
    store.attach(net, "m0")
    with torch.no_grad():
        first = net(x)
        again = net(x)  # from the pool
        store._pool.clear()
        anew = net(x)
        store.remove("m1")
        store.remove("m2")
        store.vacuum()  # which moves its blocks
        moved = [net(x) for _ in range(2)]
        column = net.weight.t()
        with pytest.raises(ArgumentError, match="its last axis must be 300"):
            net(x[..., :-1])
        turned = [first @ column.t() for _ in range(2)]
    for other in (again, anew, *moved):
        torch.testing.assert_close(other, first, rtol=0, atol=0)
    torch.testing.assert_close(turned[0], turned[1], rtol=0, atol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("used", [torch.float32, torch.float64, torch.bfloat16])
def test_a_module_of_another_dtype_than_is_stored(
    store: pydedup.Store, stored: Any, used: Any
) -> None:
    net = nn.Sequential(nn.Linear(60, 70), nn.LayerNorm(70), nn.Linear(70, 9)).to(stored).eval()
    x = torch.randn(4, 60, dtype=used)
    store.add("m", net)
    with torch.no_grad():
        wanted = net.to(used)(x)
        store.attach(net, "m")
        results = [net(x) for _ in range(2)]
    rtol = 1e-12 if used == torch.float64 else 3e-2 if used == torch.bfloat16 else 1e-4
    for got in results:
        assert got.dtype is used
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol)
    assert next(store.detach(net).parameters()).dtype is used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_calls_look_at_their_input_as_the_first_does(
    store: pydedup.Store, dtype: Any
) -> None:
    net = nn.Linear(30, 20, dtype=dtype).eval()
    store.add("m", net)
    x = torch.randn(6, 30, dtype=dtype)
    with torch.no_grad():
        wanted = net(x)
        store.attach(net, "m")
        for _ in range(2):
            net(x)
        rtol = 3e-2 if dtype is torch.bfloat16 else 1e-5
        strided = x.t().contiguous().t()
        for other in (
            strided,
            nn.Parameter(x),
            x.view(2, 3, 30),
            x[:0],
            x.clone().requires_grad_(),
        ):
            got = net(other)
            torch.testing.assert_close(
                got.view(-1, 20), wanted[: got.numel() // 20], rtol=rtol, atol=rtol
            )
        for wrong in (
            *(x[:, :-1], x.double(), x.half(), x.to("meta")),
            *(x.to_sparse(), torch._neg_view(x)),
        ):
            with pytest.raises(ArgumentError):
                net(wrong)
        for needs_grad in (False, True):
            own = x.clone().requires_grad_(needs_grad)
            with (
                torch.autograd.forward_ad.dual_level(),
                pytest.raises(ArgumentError, match="tangent"),
            ):
                net(torch.autograd.forward_ad.make_dual(own, x))
        with pytest.raises(ArgumentError, match=r"torch\.func"):
            torch.func.vmap(net)(x)
    with pytest.raises(ArgumentError, match="requires a gradient"):
        net(x.clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(net(x), wanted, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_results_in_bf16_are_those_of_kernels_rounded(
    store: pydedup.Store, rows: int, stored: Any, bias: bool
) -> None:
    net = nn.Linear(300, 130, bias=bias).to(stored).eval()
    store.add("m", net)
    x = torch.randn(rows, 300).to(torch.bfloat16)
    offset = store.tensor("m", "bias").numpy().astype(np.float32) if bias else None
    wanted = store.tensor("m", "weight").matmul(x.float().numpy(), bias=offset)
    store.attach(net.to(torch.bfloat16), "m")
    with torch.no_grad():
        for _ in range(2):  # from the database, then from the pool
            got = net(x)
            assert got.dtype is torch.bfloat16
            torch.testing.assert_close(
                got, torch.from_numpy(wanted).to(torch.bfloat16), rtol=0, atol=0
            )


class InBfloat16(nn.Module):
    """Asks for products in bf16 itself."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.conv = nn.Linear(30, 30), nn.Conv1d(30, 4, 3)
        self.attention = nn.MultiheadAttention(30, 2)

    def forward(self, x: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.dense(x)
            return y, y @ self.dense.weight, self.conv(x.T), *self.attention(y, y, y)


def test_a_module_that_enters_autocast(check: Check) -> None:
    assert check(InBfloat16(), torch.randn(7, 30), rtol=2e-2) == set()
