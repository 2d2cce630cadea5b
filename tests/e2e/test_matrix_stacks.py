# SPDX-License-Identifier: Apache-2.0
"""Tensors that are stacks of matrices: experts in one, or each under a name of its own."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import blocks, policies
from pydedup.errors import ArgumentError
from pydedup.graph import Graph, Node
from pydedup.types import DType

from .relatives import Model, adapted, added_beside, same_bits, share_of

LOSSLESS = policies.Lossless()
# Whose matrices end where a block does, in the middle of one, and within the first one.
SHAPES = (6, 256, 192), (5, 200, 320), (9, 130, 144)
# Layers with experts each, as JAX has them where it goes through layers in a loop.
DEEP = (2, 3, 192, 128)


def drawn(shape: tuple[int, ...], dtype: DType = DType.F32, seed: int = 131) -> Any:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.02, shape).astype("f4").astype(dtype.numpy)


def stacked(dtype: DType = DType.F32) -> Model:
    shapes = enumerate((*SHAPES, DEEP))
    return {f"l{i}.experts": drawn(shape, dtype, 131 + i) for i, shape in shapes}


def apart(model: Model) -> Model:
    """Return each matrix under a name of its own."""
    return {
        f"{name}.{number}.weight": np.ascontiguousarray(matrix)
        for name, stack in model.items()
        for number, matrix in enumerate(stack)
    }


@pytest.mark.parametrize("joint", [False, True])
def test_matrices_of_a_stack_share_blocks_with_those_that_stand_alone(
    store: pydedup.Store, joint: bool
) -> None:
    """As those of a mixture do that was saved before and after the layers were fused."""
    model = {"experts": drawn((6, 256, 192))}
    alone = apart(model)
    report = added_beside(store, alone, model, LOSSLESS, joint=joint)
    assert report.shared_blocks == report.blocks
    halves = {"gate": drawn((4, 128, 192), seed=5), "up": drawn((4, 128, 192), seed=6)}
    store.add("halves", apart(halves))
    fused = {"gate_up": np.concatenate([halves["gate"], halves["up"]], axis=1)}
    assert store.add("fused", fused).stored_bytes == 0
    assert same_bits(store, "m", model)
    assert same_bits(store, "fused", fused)


def turned(model: Model) -> Model:
    """Return stacks of the transposes of what they are of."""
    swapped = ((name, np.ascontiguousarray(stack.swapaxes(1, 2))) for name, stack in model.items())
    return {f"turned.{name}": stack for name, stack in swapped}


@pytest.mark.parametrize("joint", [False, True])
def test_matrices_of_a_stack_are_transposes_of_those_that_stand_alone(
    store: pydedup.Store, tmp_path: Path, joint: bool
) -> None:
    """As in a graph that multiplies by (experts, inputs, outputs) at once; it shared nothing."""
    stacks = {"up": drawn((80, 128, 192)), "down": drawn((80, 192, 128), seed=132)}
    model, alone = turned(stacks), apart(stacks)
    assert share_of(added_beside(store, alone, model, LOSSLESS, joint=joint)) < 0.01
    tuned = adapted(stacks, 4, 7)
    beside = store.add("tuned", apart(tuned), dry_run=True)
    assert share_of(store.add("tuned", turned(tuned))) < share_of(beside) + 0.03 < 0.3
    store.remove("base")
    store.vacuum()
    store.copy_to(tmp_path / "copy.db")
    with pydedup.open(tmp_path / "copy.db") as other:
        for of in (store, other):
            assert same_bits(of, "m", model)
            assert same_bits(of, "tuned", turned(tuned))
            assert of.verify().errors == []


@pytest.mark.parametrize("policy", [policies.Bounded(0.001), policies.Exact()], ids=repr)
def test_transposes_of_which_blocks_are_at_other_places(
    store: pydedup.Store, policy: policies.Policy
) -> None:
    """Those of matrices that end within a block, and under a policy without deltas."""
    stacks = {"up": drawn((5, 200, 320))}
    model = turned(stacks)
    report = added_beside(store, apart(stacks), model, policy, joint=False)
    assert (report.delta_blocks > 0) == policy.uses_deltas
    assert np.allclose(store.load("m")["turned.up"], model["turned.up"], rtol=0, atol=1e-3)
    assert store.verify().errors == []


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adapters_in_a_stack_take_what_they_do_in_a_matrix(
    store: pydedup.Store, shape: tuple[int, int, int], dtype: DType
) -> None:
    """They took what any fine-tune does, 63 and 28 %."""
    base = drawn(shape, dtype)
    model = adapted({"experts": base}, 8, 7)
    report = added_beside(store, {"experts": base}, model, LOSSLESS, joint=False)
    assert same_bits(store, "m", model)
    middle = {"w": base.reshape(-1, shape[2])}
    flat = adapted(middle, 8, 8)
    of_matrix = added_beside(store, middle, flat, LOSSLESS, joint=True)
    # Each matrix has factors of its own, and those of a block across two are of both.
    assert share_of(report) < share_of(of_matrix) + 0.16
    assert share_of(report) < 0.24


@pytest.mark.parametrize("policy", [LOSSLESS, policies.Bounded(0.01), policies.Exact()], ids=repr)
def test_whole_life(store: pydedup.Store, tmp_path: Path, policy: policies.Policy) -> None:
    base = stacked()
    model = adapted(base, 8, 9)
    for name, weights in (("base", base), ("m", model)):
        said = store.add(name, weights, policy=policy, dry_run=True)
        assert store.add(name, weights, policy=policy).stored_bytes == said.stored_bytes
    later = {name: stack.copy() for name, stack in model.items()}
    later["l0.experts"][3, 5:20] += 1
    changed = store.add("m", later, policy=policy)
    assert changed.blocks - changed.shared_blocks == 3
    store.copy_to(tmp_path / "copy.db")
    with pydedup.open(tmp_path / "copy.db") as other:
        other.remove("base@1")
        other.vacuum()
        for of in (store, other):
            report = of.verify()
            assert (report.errors, report.notes) == ([], [])
            for name, weights in (("m@1", model), ("m@2", later)):
                loaded = of.load(name)
                for key, stack in weights.items():
                    away = loaded[key].astype("f8") - stack
                    assert np.linalg.norm(away) <= policy.max_rel_error * np.linalg.norm(stack)
        assert store.info("m@2").info.digest == other.info("m@2").info.digest


def test_entries_are_taken_and_what_needs_a_matrix_is_refused(store: pydedup.Store) -> None:
    model = stacked()
    store.add("m", model)
    for name, stack in model.items():
        tensor = store.tensor("m", name)
        assert tensor.is_stack
        assert np.array_equal(tensor.take([[1, 0], [1, 1]]), stack[[[1, 0], [1, 1]]])
        assert tensor.take(np.empty(0, np.int64)).shape == (0, *stack.shape[1:])
        for ids in ([0, len(stack)], [-1]):
            with pytest.raises(ArgumentError, match=f"not all from 0 to {len(stack) - 1}"):
                tensor.take(ids)
        for use in (
            lambda t: t.matmul(np.ones((1, 192))),
            lambda t: t.bag([[0]]),
            lambda t: t.conv2d(np.ones((1, 256, 1, 300))),
        ):
            with pytest.raises(ArgumentError, match=f"no stack of matrices, as {name!r}"):
                use(tensor)


def test_what_was_stored_before_there_were_stacks(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stacked()
    later = {name: stack + np.float32(0.0001) for name, stack in model.items()}
    with pydedup.open(url) as store, monkeypatch.context() as patched:
        patched.setattr(blocks, "row_axes", lambda shape: 1)
        store.add("m", model, block_shape=(8, 64))
        assert not store.tensor("m", "l0.experts").is_stack
    with pydedup.open(url) as store:
        assert same_bits(store, "m@1", model)
        store.add("m", later, block_shape=(8, 64))
        assert store.tensor("m@2", "l0.experts").is_stack
        store.copy_to(tmp_path / "copy.db")
        with pydedup.open(tmp_path / "copy.db") as other:
            assert same_bits(other, "m@1", model)
            assert same_bits(other, "m@2", later)
            assert not other.tensor("m@1", "l0.experts").is_stack
            assert other.verify().errors == []
        np.savez(tmp_path / "m.npz", allow_pickle=False, **model)
    with sqlite3.connect(tmp_path / "store.db") as raw:
        raw.execute("UPDATE pydedup_pages SET payload = zeroblob(9) WHERE id = 1")
    raw.close()
    with pydedup.open(url) as store:
        assert store.verify().errors
        assert store.verify(repair_from=tmp_path / "m.npz").errors == []
        assert same_bits(store, "m@1", model)
        assert same_bits(store, "m@2", later)


def test_a_kernel_of_a_convolution_is_no_stack(store: pydedup.Store) -> None:
    store.add("m", {"taps": drawn((64, 256, 127)), "images": drawn((8, 4, 130, 120))})
    x = drawn((1, 256, 1, 200))
    y = store.tensor("m", "taps").conv2d(x)
    assert y.shape == (1, 64, 1, 74)
    assert store.tensor("m", "images").matmul(np.ones((1, 4 * 130 * 120))).shape == (1, 8)


@pytest.mark.parametrize("order", ["magnitude", "saliency"])
def test_a_kernel_as_large_as_an_image_is_no_stack_where_the_graph_tells(
    store: pydedup.Store, tmp_path: Path, order: str
) -> None:
    """It could be added, and the model then not predict."""
    node = Node("conv2d", ("x",), "y", {"weight": "kernel"}, {"groups": 2})
    graph = Graph(("x",), ("y",), (node,))
    model = {"kernel": drawn((4, 2, 128, 130))}
    variant = adapted(model, 8, 10)
    moved = []

    def finetune(weights: Model, frozen: Model) -> Model:
        moved.append((weights["kernel"] != variant["kernel"]) & ~frozen["kernel"])
        return {}

    saliency = variant if order == "saliency" else None
    policy = policies.Accuracy(
        lambda weights: 1.0, 0.1, order=order, saliency=saliency, finetune=finetune
    )
    store.add("m", model, graph=graph)
    store.add("v", variant, graph=graph, policy=policy)
    store.copy_to(tmp_path / "copy.db")
    x = drawn((3, 4, 129, 133), seed=3)
    windows = np.lib.stride_tricks.sliding_window_view(x, (128, 130), (2, 3))
    with pydedup.open(tmp_path / "copy.db") as copied:
        for of in (store, copied):
            assert not of.tensor("m", "kernel").is_stack
            for name in ("m", "v"):
                kernel = of.load(name)["kernel"].astype("f8")
                wanted = [
                    np.einsum("nchwyx,ocyx->nohw", windows[:, 2 * i : 2 * i + 2], part)
                    for i, part in enumerate((kernel[:2], kernel[2:]))
                ]
                y = of.predict(name, x)
                assert np.allclose(y, np.concatenate(wanted, axis=1), rtol=1e-3, atol=1e-3)
            assert of.verify().errors == []
    assert len(moved) == 1
    assert not moved[0].any()


@pytest.mark.parametrize(
    "policy", [LOSSLESS, policies.Accuracy(lambda weights: 1.0, 0.1)], ids=lambda one: one.name
)
def test_a_kernel_that_the_graph_knows_by_the_second_of_its_names(
    store: pydedup.Store, policy: policies.Policy
) -> None:
    """It was cut as a stack, under `Accuracy` with the hashes of one, which verify told of."""
    graph = Graph(("x",), ("y",), (Node("conv2d", ("x",), "y", {"weight": "used"}),))
    kernel = drawn((4, 2, 130, 140))
    store.add("m", {"tied": kernel, "used": kernel}, graph=graph, policy=policy)
    assert not store.tensor("m", "tied").is_stack
    x = drawn((1, 2, 130, 140), seed=3)
    assert np.allclose(store.predict("m", x)[0, :, 0, 0], (kernel * x).sum((1, 2, 3)), atol=1e-4)
    assert store.verify().errors == []
