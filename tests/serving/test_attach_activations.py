# SPDX-License-Identifier: Apache-2.0
"""Counting the activations of attached modules hinders no call that would do without it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup

torch = pytest.importorskip("torch")

from pydedup.serving.attached import pieces  # noqa: E402
from pydedup.serving.attached.activations import Activations  # noqa: E402
from pydedup.serving.plan import bytes_of_factor  # noqa: E402

nn = torch.nn


def test_a_module_may_call_its_parts_on_threads_of_its_own(tmp_path: Path) -> None:
    class SideBySide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(512, 512) for _ in range(2))

        def forward(self, x: Any) -> Any:
            seen: dict[int, Any] = {}

            def call(number: int) -> None:
                with torch.no_grad():
                    seen[number] = self.parts[number](x)

            run_all([lambda: call(0), lambda: call(1)])
            return seen[0] + seen[1]

    module = SideBySide().eval()
    x = torch.randn(600, 512)
    with torch.no_grad(), pydedup.open(tmp_path / "a.db", memory="64MiB") as store:
        want = module(x)
        store.add("m", module)
        store.attach(module, "m")
        for _ in range(3):  # measured, then known
            torch.testing.assert_close(module(x), want, atol=1e-4, rtol=1e-4)
        # Called on their own, they wait for each other as modules do.
        run_all([lambda: module.parts[0](x), lambda: module.parts[1](x)])
        assert not store._pool._shares._activations._holders
        assert store._pool.stats()["reserved_bytes"] == 2 * 512 * 4  # biases


def run_all(calls: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "waits for ever"


def test_a_weight_is_loaded_though_activations_may_need_the_room(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv3d(900, 64, 5)).eval()  # 27 of 32 MiB
    x = torch.randn(1, 900, 5, 5, 5)
    with torch.no_grad(), pydedup.open(tmp_path / "a.db", memory="64MiB") as store:
        want = module(x)
        store.add("m", module)
        store.attach(module, "m")
        torch.testing.assert_close(module(x), want, atol=1e-4, rtol=1e-4)
        weights = 4 * (900 * 125 * 64 + 64)
        assert store._pool.stats()["reserved_bytes"] == weights
        # What is left is enough for a page and its base, also while activations are counted.
        with store._pool.activations(store._pool.activation_bytes):
            stats = store._pool.stats()
            assert stats["budget_bytes"] - stats["reserved_bytes"] >= 2 << 20
            assert stats["reserved_bytes"] > weights


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_module_may_be_given_a_nested_tensor(tmp_path: Path, layout: Any) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Any) -> Any:
            return self.linear(x.to_padded_tensor(0.0)).repeat(8, 1, 1)

    module = Padded().eval()
    with torch.no_grad(), pydedup.open(tmp_path / "a.db", memory="64MiB") as store:
        store.add("m", module)
        attached = store.attach(Padded().eval(), "m")
        for rows in (900, 900, 1000, 300, 3000):
            x = torch.nested.nested_tensor([torch.ones(rows, 64), torch.ones(2, 64)], layout=layout)
            torch.testing.assert_close(attached(x), module(x), atol=1e-4, rtol=1e-4)


def test_a_plan_is_used_though_another_thread_forgets_all(tmp_path: Path) -> None:
    class Forgotten(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            known._known = {}  # as another thread that brings one shape too many
            return super().__contains__(key)

    module = nn.Sequential(nn.Linear(8, 4)).eval()
    with pydedup.open(tmp_path / "a.db") as store:
        store.add("m", module)
        tensor = store._catalog.model("m").tensor
        known = pieces.Pieces(module)
        x = (torch.ones(10, 8),)
        rows = known.rows(module, x, tensor, 1)
        known._known = Forgotten(known._known)
        assert known.rows(module, x, tensor, 1) == rows == 1


def test_what_a_call_takes_beyond_what_was_expected_is_counted(tmp_path: Path) -> None:
    class Cubic(nn.Module):  # grows faster than attention does
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            large = torch.ones(len(x) ** 3)
            reserved.append(store._pool.stats()["reserved_bytes"])
            return self.scale(x) + large[0]

    reserved: list[int] = []
    with torch.no_grad(), pydedup.open(tmp_path / "a.db", memory="256MiB") as store:
        module = Cubic().eval()
        store.add("m", module)
        store.attach(module, "m")
        for rows in (100, 200):
            module(torch.ones(rows, 4))
        beside = store._pool._shares._scratch  # may be used beside the budget
        assert 0 <= reserved[1] - (4 * 200**3 - beside) <= 2 << 20
        assert store._pool.stats()["reserved_bytes"] == 4 * 4  # the bias


@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, 4), (torch.bfloat16, 2 + 4)])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 64), (9_999, 4)),
        (nn.Conv1d(4, 64, 3, stride=2, padding=1), (2, 4, 9_999)),
        (nn.Conv2d(4, 64, 3, stride=2, padding=1), (2, 4, 99, 97)),
    ],
)
def test_sums_that_rest_beside_a_result_in_bf16_are_counted(
    tmp_path: Path, module: Any, shape: tuple[int, ...], dtype: Any, each: int
) -> None:
    """A convolution took three times as much as was counted, a product half as much again."""
    module, x = copy.deepcopy(module).eval().to(dtype), torch.randn(shape).to(dtype)
    with torch.no_grad(), pydedup.open(tmp_path / "a.db", memory="64MiB") as store:
        store.add("m", module)
        store.attach(module, "m")
        numbers = module(x).numel()
        (known,) = Activations.of(store._pool)._peaks.values()
        (peak,) = known.values()
        if x.ndim == 2:  # a product, which packs x
            stored = store.tensor("m", "weight").dtype
            peak -= bytes_of_factor(np.empty(shape, stored.numpy), stored, transpose=False)
        assert peak == numbers * each


def test_calls_wait_for_the_room_that_others_take(tmp_path: Path) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            entered.append(1)
            inside.set()
            assert go_on.wait(60)
            return self.part(x)

    def start(module: Any) -> threading.Thread:
        thread = threading.Thread(target=module, args=(torch.ones(3, 4),), daemon=True)
        thread.start()
        return thread

    entered: list[int] = []
    inside, go_on = threading.Event(), threading.Event()
    with pydedup.open(tmp_path / "a.db", memory="64MiB") as store:
        module = Held().eval().requires_grad_(False)
        store.add("m", module)
        store.attach(module, "m")
        with store._pool.activations(store._pool.activation_bytes):
            part = start(module.part)  # by itself, and not within a call of its module
            part.join(0.3)
            assert part.is_alive()
        part.join(60)
        assert not part.is_alive()
        first = start(module)
        assert inside.wait(60)
        second = start(module)
        second.join(0.3)
        assert len(entered) == 1
        go_on.set()
        for thread in (first, second):
            thread.join(60)
            assert not thread.is_alive()
        assert len(entered) == 2


@pytest.mark.parametrize("step", ["_push_mode", "_pop_mode"])
def test_an_interrupt_while_torch_enters_or_leaves_what_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It went on to see all that the thread did, and asked a call that was over for memory."""
    from torch.utils import _python_dispatch

    original = getattr(_python_dispatch, step)

    def interrupted(*given: Any) -> None:
        if step == "_push_mode":
            original(*given)
        raise KeyboardInterrupt

    module = nn.Sequential(nn.Linear(80, 70), nn.ReLU(), nn.Linear(70, 5)).eval()
    x = torch.randn(3, 80)
    with torch.no_grad(), pydedup.open(tmp_path / "a.db", memory="64MiB") as store:
        store.add("m", module)
        attached = store.attach(copy.deepcopy(module), "m")
        with monkeypatch.context() as patched:
            patched.setattr(_python_dispatch, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                attached(x)
        assert torch._C._len_torch_dispatch_stack() == 0
        torch.testing.assert_close(attached(x), module(x))
        assert not store._pool._shares._activations._holders
