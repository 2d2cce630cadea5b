# SPDX-License-Identifier: Apache-2.0
"""The text classifiers of the families: an embedding bag on GloVe -> 64 -> classes, trained here.

Six on six corpora, and two of them trained further. `ROWS` moves the rows of the words that are
seen (Adagrad, one step size per row); `DENSE` is the same with AdamW on the whole table, which
moves every row, seen or not. None keeps its table frozen. Not here: what is done with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from _data import Corpus, corpora
from numpy.typing import NDArray
from rich.console import Console
from torch import nn
from torch.nn import functional

from pydedup.demo.data import Split
from pydedup.demo.models import Spec, base_table, embedding
from pydedup.demo.train import train_all

__all__ = ["DENSE", "FAMILIES", "FURTHER", "ROWS", "SIX", "Family", "scorer", "trained"]

SIX = ("imdb@1", "rt@1", "bbc@1", "section@1", "role@1", "language@1")
FURTHER = ("imdb@2", "section@2")


#: Batch, and epochs by rows and by AdamW: small corpora need more of the latter's small steps.
_PACE = {
    "imdb": (64, 4, 5),
    "rt": (64, 4, 10),
    "bbc": (32, 4, 6),
    "section": (128, 4, 4),
    "role": (64, 4, 8),
    "language": (64, 4, 12),
}


def _specs(*, dense: bool) -> dict[str, Spec]:
    """Return how each is trained; AdamW in larger batches, since a step costs the whole table."""
    specs = []
    for seed, name in enumerate(SIX, 11):
        task = name[:-2]
        batch, by_rows, by_adamw = _PACE[task]
        if dense:
            size = batch if task == "bbc" else 4 * batch
            specs.append(Spec(name, task, by_adamw, size, 2e-3, 0.0, seed, dense=True))
        else:
            specs.append(Spec(name, task, by_rows, batch, 1e-3, 0.03, seed))
    for seed, name in enumerate(FURTHER, 21):
        first = next(spec for spec in specs if spec.task == name[:-2])
        slower = {"rate": first.rate / 2, "row_rate": first.row_rate / 3}
        specs.append(replace(first, name=name, epochs=1, seed=seed, further=first.name, **slower))
    return {spec.name: spec for spec in specs}


ROWS, DENSE = _specs(dense=False), _specs(dense=True)
FAMILIES: Mapping[str, Mapping[str, Spec]] = {"row-wise": ROWS, "dense": DENSE}


@dataclass(frozen=True, slots=True)
class Family:
    """Trained classifiers by address, the table that they started from, and their corpora."""

    models: dict[str, nn.Sequential]
    base: torch.Tensor
    corpora: dict[str, Corpus]

    def corpus(self, name: str) -> Corpus:
        """Return what a model was trained on."""
        return self.corpora[name.partition("@")[0]]


def trained(which: str, cache: Path, console: Console, names: tuple[str, ...]) -> Family:
    """Return the classifiers with these names, trained or from the cache."""
    vectors, found = corpora(cache, console)
    base = base_table(vectors.table)
    specs = {name: FAMILIES[which][name] for name in names}
    folder = cache / "families" / which / str(len(names))
    tasks = {name: corpus.task for name, corpus in found.items()}
    return Family(train_all(tasks, base, folder, console, specs=specs), base, found)


def scorer(split: Split) -> Callable[[nn.Module], NDArray[np.float64]]:
    """Return what gives 1 for each text that a classifier gets right, and 0 for each other."""
    ids, offsets = torch.from_numpy(split.bags.ids), torch.from_numpy(split.bags.offsets)

    def scores(model: nn.Module) -> NDArray[np.float64]:
        assert isinstance(model, nn.Sequential)
        mean = functional.embedding_bag(ids, embedding(model).weight, offsets, mode="mean")
        right = model[1:](mean).argmax(dim=1).numpy() == split.labels
        return right.astype(np.float64)

    return scores
