# SPDX-License-Identifier: Apache-2.0
"""A small network for images, trained in torch: stored, varied, served without torch, exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.opening import connect_store

torch = pytest.importorskip("torch")
nn = torch.nn


def network() -> torch.nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=4),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def images(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bars that lie, stand, or cross, in noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.3, (count, 1, 16, 16)).astype(np.float32)
    labels = rng.integers(0, 3, count)
    for image, label in zip(x, labels, strict=True):
        row, column = rng.integers(2, 14, 2)
        if label != 1:
            image[0, row] += 1
        if label != 0:
            image[0, :, column] += 1
    return torch.from_numpy(x), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def trained() -> torch.nn.Module:
    torch.manual_seed(0)
    module = network()
    optimiser = torch.optim.Adam(module.parameters(), 0.01)
    for step in range(60):
        x, labels = images(step, 64)
        loss = nn.functional.cross_entropy(module(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return module.eval()


@pytest.mark.parametrize(
    "policy", [policies.Exact(), policies.Lossless()], ids=["exact", "lossless"]
)
def test_a_trained_network_is_served(
    trained: torch.nn.Module, policy: object, tmp_path: Path
) -> None:
    x, labels = images(1000, 128)
    want = trained(x).detach().numpy()
    assert (want.argmax(1) == labels.numpy()).mean() > 0.9  # it did learn
    with pydedup.open(f"sqlite:///{tmp_path}/m.db") as store:
        store.add("bars", trained, policy=policy)
        got = store.predict("bars", x.numpy())
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
        one = store.predict("bars", x[:1].numpy())
        assert np.abs(one - want[:1]).max() <= 1e-5 * np.abs(want).max()
        # A variant with another head shares its layers and is served beside it.
        state = trained.state_dict()
        variant = network()
        variant.load_state_dict({**state, "10.bias": state["10.bias"] + 1})
        report = store.add("bars@shifted", variant.eval(), policy=policy)
        assert report.shared_blocks >= report.blocks - 1
        shifted = store.predict("bars@shifted", x.numpy())
        assert np.abs(shifted - want - 1).max() <= 1e-5 * np.abs(want).max() + 1e-6
        filters = store.tensor("bars@shifted", "4.weight")
        assert filters.shape == (24, 12, 3, 3)
        inner = torch.rand(2, 12, 9, 9)
        for options in ({}, {"stride": 2, "padding": 1}):
            direct = filters.conv2d(inner.numpy(), **options)
            theirs = nn.functional.conv2d(inner, state["4.weight"], **options).numpy()
            np.testing.assert_allclose(direct, theirs, rtol=1e-4, atol=1e-5)
    adapter = connect_store(f"sqlite:///{tmp_path}/m.db", mode="r")
    with pydedup.Store(adapter, 64 << 10) as store:  # less than `pydedup.open` takes
        tight = store.predict("bars@shifted", x.numpy())
        # In pieces of few images, which are summed in another order than many.
        assert np.abs(tight - shifted).max() <= 1e-6 * np.abs(shifted).max()


def test_an_exported_network_is_served_from_onnx(trained: torch.nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper, save

    state = {name: value.numpy() for name, value in trained.state_dict().items()}
    norm = [f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    node = helper.make_node
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        node("Conv", ["x", "0.weight"], ["a"], **same),
        node("BatchNormalization", ["a", *norm], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("MaxPool", ["c"], ["d"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["d", "4.weight", "4.bias"], ["e"], strides=[2, 2], **same),
        node("Relu", ["e"], ["f"]),
        node("Conv", ["f", "6.weight", "6.bias"], ["g"], group=4, **same),
        node("Sigmoid", ["g"], ["h"]),
        node("Mul", ["g", "h"], ["i"]),
        node("GlobalAveragePool", ["i"], ["j"]),
        node("Flatten", ["j"], ["k"]),
        node("Gemm", ["k", "10.weight", "10.bias"], ["y"], transB=1),
    ]
    x_info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 16, 16])
    y_info = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    weights = [
        numpy_helper.from_array(value, name)
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    ]
    graph = helper.make_graph(nodes, "bars", [x_info], [y_info], weights)
    path = tmp_path / "bars.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    x, _ = images(7, 20)
    want = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})[0]
    with pydedup.open(f"sqlite:///{tmp_path}/m.db") as store:
        store.add("bars", path)
        got = store.predict("bars", x.numpy())
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    np.testing.assert_allclose(got, trained(x).detach().numpy(), rtol=1e-4, atol=1e-4)
