# SPDX-License-Identifier: Apache-2.0
"""conv2d with a weight on the pages of a pool beside torch's.

    python bench/peers/conv.py [--seconds S] [--only AREA] [--json]

Layers of networks that people use, f32, two threads on both sides. torch is given the weight as it
is; nothing is compiled or laid out for it beforehand, as in any model that was just loaded. Results
are held against torch's in float64.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _timing import Row, compare, main

import pydedup
from pydedup import policies


@dataclass(frozen=True, slots=True)
class Layer:
    """A square convolution of a square image."""

    name: str
    channels: int
    out: int
    size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return self.out, self.channels // self.groups, self.kernel, self.kernel

    def multiply_adds(self, batch: int) -> float:
        side = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        return float(batch * side * side) * float(np.prod(self.weight))


RESNET = [
    Layer("conv1 7x7/2, 3 to 64, 224", 3, 64, 224, 7, 2, 3),
    Layer("3x3, 64 to 64, 56", 64, 64, 56, 3, 1, 1),
    Layer("3x3, 128 to 128, 28", 128, 128, 28, 3, 1, 1),
    Layer("3x3, 256 to 256, 14", 256, 256, 14, 3, 1, 1),
    Layer("3x3, 512 to 512, 7", 512, 512, 7, 3, 1, 1),
    Layer("3x3/2, 64 to 128, 56", 64, 128, 56, 3, 2, 1),
    Layer("1x1/2, 64 to 128, 56", 64, 128, 56, 1, 2),
    Layer("1x1, 256 to 64, 56", 256, 64, 56, 1),
    Layer("1x1, 512 to 2048, 7", 512, 2048, 7, 1),
]
MOBILENET = [
    Layer("depthwise 3x3/2, 96, 112", 96, 96, 112, 3, 2, 1, 96),
    Layer("depthwise 3x3, 144, 56", 144, 144, 56, 3, 1, 1, 144),
    Layer("depthwise 3x3, 576, 14", 576, 576, 14, 3, 1, 1, 576),
    Layer("1x1, 24 to 144, 56", 24, 144, 56, 1),
    Layer("1x1, 320 to 1280, 7", 320, 1280, 7, 1),
]
CONVNEXT = [
    Layer("depthwise 7x7, 96, 56", 96, 96, 56, 7, 1, 3, 96),
    Layer("depthwise 7x7, 192, 28", 192, 192, 28, 7, 1, 3, 192),
    Layer("depthwise 7x7, 384, 14", 384, 384, 14, 7, 1, 3, 384),
    Layer("depthwise 7x7, 768, 7", 768, 768, 7, 7, 1, 3, 768),
]
LENET = [
    Layer("5x5, 1 to 6, 28", 1, 6, 28, 5, 1, 2),
    Layer("5x5, 6 to 16, 14", 6, 16, 14, 5),
]


def layers(
    network: str, chosen: Sequence[Layer], batches: Sequence[int], seconds: float
) -> Iterator[Row]:
    """Yield each layer with each size of batch."""
    rng = np.random.default_rng(0)
    weights = {
        str(i): rng.standard_normal(layer.weight, np.float32) / np.float32(layer.kernel)
        for i, layer in enumerate(chosen)
    }
    with tempfile.TemporaryDirectory() as folder, pydedup.open(Path(folder) / "m.db") as store:
        store.add("m", weights, policy=policies.Exact())
        for i, layer in enumerate(chosen):
            stored = store.tensor("m", str(i))
            whole = torch.from_numpy(weights[str(i)])
            how = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
            for batch in batches:
                x = rng.standard_normal((batch, layer.channels, layer.size, layer.size), np.float32)
                given = torch.from_numpy(x)
                exact = torch.nn.functional.conv2d(given.double(), whole.double(), **how).numpy()
                error = np.abs(stored.conv2d(x, **how) - exact).max() / np.abs(exact).max()
                assert error < 1e-5, f"{layer}, batch {batch}: wrong by {error}"
                yield from compare(
                    f"{network} {layer.name}, batch {batch}",
                    unit="GFLOP/s",
                    work=2.0 * layer.multiply_adds(batch),
                    sides={
                        "pydedup": lambda s=stored, x=x, how=how: s.conv2d(x, **how),  # type: ignore[misc]
                        "torch": lambda g=given, w=whole, how=how: torch.nn.functional.conv2d(  # type: ignore[misc]
                            g, w, **how
                        ),
                    },
                    seconds=seconds,
                    settle=True,
                )


def resnet(seconds: float) -> Iterator[Row]:
    """Yield layers of ResNet-18 and ResNet-50."""
    yield from layers("ResNet", RESNET, (1, 8), seconds)


def mobilenet(seconds: float) -> Iterator[Row]:
    """Yield layers of MobileNet v2."""
    yield from layers("MobileNet", MOBILENET, (1, 8), seconds)


def convnext(seconds: float) -> Iterator[Row]:
    """Yield the depthwise layers of ConvNeXt-T."""
    yield from layers("ConvNeXt", CONVNEXT, (1, 8), seconds)


def lenet(seconds: float) -> Iterator[Row]:
    """Yield the convolutions of LeNet-5."""
    yield from layers("LeNet", LENET, (1, 64), seconds)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(__doc__, [resnet, mobilenet, convnext, lenet])
