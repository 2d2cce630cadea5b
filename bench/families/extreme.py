# SPDX-License-Identifier: Apache-2.0
"""Extreme classification, small: which of some 600 tags has a Debian package? By date and by seed.

    python bench/families/extreme.py [--quick]

Two dense layers, 20,000 words -> 256 -> tags, sparse weighted bags of words in; the paper's shape
at a tenth. The first model knows 60 % of the packages, its next versions 80 % and all of them
(trained further each time), and others are trained further from the first on samples drawn by
seed. Precision at one (is the highest tag one that the package has?) may fall by one point, shown
at 95 % confidence.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from _data import DebianPackage, debian_packages, index_date
from _measure import Member, console, family_table, options, store_family
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pydedup import policies

_WORDS = 20_000
_HIDDEN = 256
_LEAST_PER_TAG = 5
_VALIDATION = _HELD_OUT = 4000
_WORD = re.compile(r"[a-z0-9+]+")


@dataclass(frozen=True, slots=True)
class Texts:
    """Bags of weighted words, as `nn.EmbeddingBag` takes them, and which tags each has."""

    ids: list[Tensor]
    weights: list[Tensor]
    tags: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, offsets and weights of some bags, one after another."""
        lengths = torch.tensor([0] + [len(self.ids[row]) for row in rows[:-1]])
        ids = torch.cat([self.ids[row] for row in rows])
        return ids, lengths.cumsum(0), torch.cat([self.weights[row] for row in rows])


def read(packages: Sequence[DebianPackage]) -> Texts:
    """Return the packages with tags, in an order drawn once: word ranks, tf-idf of unit length."""
    counts = Counter(tag for package in packages for tag in package.tags)
    tags = sorted(tag for tag, n in counts.items() if n >= _LEAST_PER_TAG)
    number = {tag: i for i, tag in enumerate(tags)}
    found = [_WORD.findall(package.text.lower()) for package in packages]
    documents = Counter(word for words in found for word in set(words))
    rank = {word: i for i, (word, _) in enumerate(documents.most_common(_WORDS))}
    ids, weights, rows = [], [], []
    for row in np.random.default_rng(5).permutation(len(packages)):
        bag = Counter(word for word in found[row] if word in rank)
        mine = [number[tag] for tag in packages[row].tags if tag in number]
        if not bag or not mine:
            continue
        idf = [np.log(len(packages) / documents[word]) * n for word, n in bag.items()]
        ids.append(torch.tensor([rank[word] for word in bag]))
        weights.append(torch.tensor(idf, dtype=torch.float32) / float(np.linalg.norm(idf)))
        rows.append(functional.one_hot(torch.tensor(mine), len(tags)).sum(0).bool())
    return Texts(ids, weights, torch.stack(rows))


class Network(nn.Module):
    def __init__(self, tags: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(_WORDS, _HIDDEN, mode="sum")
        nn.init.normal_(self.words.weight, std=0.05)
        self.tags = nn.Linear(_HIDDEN, tags)

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        outputs: Tensor = self.tags(torch.relu(self.words(ids, offsets, weights)))
        return outputs


def fit(module: Network, texts: Texts, rows: NDArray[np.int64], epochs: int, seed: int) -> None:
    optimiser = torch.optim.AdamW(module.parameters(), 2e-3 if epochs > 1 else 5e-4, fused=True)
    shuffle = np.random.default_rng(seed)
    module.train()
    for _ in range(epochs):
        order = shuffle.permutation(rows)
        for start in range(0, len(order), 128):
            chosen = order[start : start + 128].tolist()
            outputs = module(*texts.batch(chosen))
            loss = functional.binary_cross_entropy_with_logits(
                outputs, texts.tags[chosen].float(), reduction="sum"
            )
            optimiser.zero_grad()
            (loss / len(chosen)).backward()
            optimiser.step()
    module.eval()


def first_tag_right(
    texts: Texts, rows: Sequence[int]
) -> Callable[[nn.Module], NDArray[np.float64]]:
    """Return what gives 1 for each package whose highest tag is one of its own: mean P@1."""
    batch, tags = texts.batch(rows), texts.tags[list(rows)]

    def scores(module: nn.Module) -> NDArray[np.float64]:
        with torch.inference_mode():
            best = module(*batch).argmax(1)
        right: NDArray[np.float64] = tags[torch.arange(len(tags)), best].numpy().astype(np.float64)
        return right

    return scores


def run(chosen: argparse.Namespace) -> None:
    texts = read([package for package in debian_packages() if package.tags])
    held_out = list(range(_HELD_OUT))
    validation = list(range(_HELD_OUT, _HELD_OUT + _VALIDATION))
    rows = np.arange(_HELD_OUT + _VALIDATION, len(texts))
    console.print(
        f"{len(texts):,} packages of {index_date()}, {texts.tags.shape[1]} tags, {_WORDS:,} words"
    )
    parts = {"tags@1": rows[: int(0.6 * len(rows))], "tags@2": rows[: int(0.8 * len(rows))]}
    if not chosen.quick:
        parts["tags@3"] = rows
        for seed in (1, 2, 3):
            draw = np.random.default_rng(seed)
            parts[f"sample-{seed}@1"] = draw.choice(rows, len(rows) // 2)
    modules: dict[str, Network] = {}
    for seed, (name, part) in enumerate(parts.items(), 31):
        torch.manual_seed(seed)
        module = Network(texts.tags.shape[1])
        if modules:
            before = "tags@2" if name == "tags@3" else "tags@1"
            module.load_state_dict(modules[before].state_dict())
        fit(module, texts, part, 1 if modules else 4, seed)
        modules[name] = module
    members, plain = [], []
    for name, module in modules.items():
        arrays = {key: value.numpy().copy() for key, value in module.state_dict().items()}
        evaluate = policies.torch_evaluate(module, first_tag_right(texts, validation))
        test = policies.torch_evaluate(module, first_tag_right(texts, held_out))
        members.append(
            Member(name, arrays, policies.Accuracy(evaluate, 0.01, confidence=0.95), test)
        )
        plain.append(Member(name, arrays, policies.Lossless()))
    result = store_family("tags of packages, Accuracy(0.01, 95 %)", members)
    console.print(family_table(result))
    mean, half = result.mean_drop()
    console.print(f"  mean held-out drop {100 * mean:+.2f} +- {100 * half:.2f} points of P@1")
    lossless = store_family("Lossless", plain, tell=False)
    console.print(f"  the same, Lossless: {lossless.file_bytes / 1e6:.1f} MB\n")


if __name__ == "__main__":
    run(options(__doc__))
