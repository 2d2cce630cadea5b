# SPDX-License-Identifier: Apache-2.0
"""Graphs inferred from torch modules, computed against torch."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pydedup.formats.infer_torch import _DESCRIBE, infer_from_torch
from pydedup.testing.graphs import compute


class OwnForward(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)  # type: ignore[no-any-return,no-untyped-call]


class PlainSubclass(nn.Sequential):
    """Without a forward of its own: still a chain."""


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _trained_norm(module: nn.Module) -> nn.Module:
    """Give a batch norm statistics that differ from the initial ones."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.dtype == torch.float32:
                value.uniform_(0.5, 1.5) if "var" in name else value.normal_()
    return module


IDS = torch.tensor([[1, 2, 0], [4, 0, 0], [3, 3, 1], [0, 0, 0], [3, 3, 3]])

CHAINS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(5, 7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 2, bias=False)
        ),
        torch.randn(3, 5),
    ),
    "nested": (
        lambda: PlainSubclass(
            nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Sequential(nn.Softmax(-1))
        ),
        torch.randn(3, 5),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3), nn.LogSoftmax(1)),
        IDS,
    ),
    "bag-mean": (lambda: nn.Sequential(nn.EmbeddingBag(6, 4), nn.Linear(4, 2)), IDS),
    "bag-sum-padded": (
        lambda: nn.Sequential(nn.EmbeddingBag(6, 4, mode="sum", padding_idx=0), nn.SiLU()),
        IDS,
    ),
    "bag-max-padded-from-the-end": (
        lambda: nn.Sequential(nn.EmbeddingBag(6, 4, mode="max", padding_idx=-3)),
        IDS,
    ),
    "norms": (
        lambda: nn.Sequential(nn.BatchNorm1d(5, eps=0.01), nn.GELU(), nn.LayerNorm(5), nn.ELU(0.7)),
        torch.randn(3, 5),
    ),
    "norms-of-rank-3": (
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm((4, 6)), nn.LeakyReLU(0.2)),
        torch.randn(3, 4, 6),
    ),
    "activations": (
        lambda: nn.Sequential(nn.GELU("tanh"), nn.Softplus(), nn.Sigmoid(), nn.Identity()),
        torch.randn(3, 5) * 10,
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_torch_chains_compute_the_same(name: str) -> None:
    torch.manual_seed(1)
    module = _trained_norm(CHAINS[name][0]()).eval()
    x = CHAINS[name][1]
    graph = infer_from_torch(module)
    assert graph is not None
    tensors = {key: value.numpy() for key, value in module.state_dict().items()}
    graph.validate({key: value.shape for key, value in tensors.items()})
    (result,) = compute(graph, tensors, x.numpy())
    np.testing.assert_allclose(result, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_layer_may_be_called_as_the_input_is() -> None:
    module = nn.Sequential(OrderedDict(input=nn.Linear(3, 3), output=nn.Linear(3, 2)))
    for chain in (module, module[:1]):
        graph = infer_from_torch(chain)
        assert graph is not None
        assert graph.inputs == ("input",)
        tensors = {key: value.numpy() for key, value in chain.state_dict().items()}
        x = torch.randn(2, 3)
        (result,) = compute(graph, tensors, x.numpy())
        np.testing.assert_allclose(result, chain(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_layer_used_twice_appears_twice() -> None:
    shared = nn.Linear(4, 4)
    module = nn.Sequential(shared, nn.ReLU(), shared).eval()
    graph = infer_from_torch(module)
    assert graph is not None
    assert [node.op for node in graph.nodes] == ["linear", "relu", "linear"]
    tensors = {key: value.numpy() for key, value in module.state_dict().items()}
    x = torch.randn(2, 4)
    (result,) = compute(graph, tensors, x.numpy())
    np.testing.assert_allclose(result, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def _with_hook() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].register_forward_hook(lambda layer, args, output: output * 2)
    return module


def _with_outer_hook() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2))
    module.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    return module


def _with_patched_forward() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2))
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def _without_layer() -> nn.Module:
    module = nn.Sequential(nn.ReLU())
    module.add_module("none", None)
    return module


def _with_patched_layer() -> nn.Module:
    module = nn.Sequential(nn.ReLU())
    module[0].forward = lambda x: x
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: OwnForward(nn.Linear(2, 2)),
        lambda: nn.Sequential(Doubling(2, 2)),
        lambda: nn.Sequential(nn.Linear(2, 2), OwnForward(nn.ReLU())),
        _with_hook,
        _with_outer_hook,
        _with_patched_forward,
        _with_patched_layer,
        _without_layer,
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))),
        lambda: nn.Sequential(nn.Conv1d(2, 2, 1)),
        lambda: nn.Sequential(nn.LSTM(2, 2)),
        lambda: nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)),
        lambda: nn.Sequential(nn.EmbeddingBag(3, 2, max_norm=1.0)),
        lambda: nn.Sequential(nn.Flatten(0, 1)),
        lambda: nn.Sequential(nn.Softmax(None)),
        lambda: nn.Sequential(nn.Softplus(beta=2)),
        lambda: nn.Sequential(nn.LayerNorm(3, elementwise_affine=False)),
        lambda: nn.Sequential(nn.LayerNorm(3, bias=False)),
        lambda: nn.Sequential(nn.BatchNorm1d(3, affine=False)),
        lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)),
        nn.Sequential,
        lambda: nn.Linear(2, 2),
        lambda: nn.ModuleList([nn.Linear(2, 2)]),
        lambda: object(),
    ],
)
def test_uncertain_torch_modules_have_no_graph(make: Callable[[], object]) -> None:
    assert infer_from_torch(make()) is None


def test_the_guide_lists_the_layers_that_are_known() -> None:
    guide = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    (listed,) = re.findall(r"knows the layers (.*?) and the dropouts", guide, re.DOTALL)
    known = {name.rpartition(".")[2] for name in _DESCRIBE}
    assert set(re.findall(r"`([A-Z]\w+)`", listed)) == known
