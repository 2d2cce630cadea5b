# SPDX-License-Identifier: Apache-2.0
"""Training of the demo's classifiers, and a cache of what was trained.

The dense layers learn with AdamW. The embedding learns row by row: only the rows of words in the
batch take part, each with its own step size (Adagrad with one accumulator per row), so that words
that the corpus does not use keep the bits of the base table. That is what makes fine-tuned
tables near copies of each other; an optimiser over the dense table moves every row.

The same machine trains the same bits again. Nothing here knows the store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from torch import Tensor, nn
from torch.nn import functional

from pydedup.demo import data, models
from pydedup.demo.checks import accuracy
from pydedup.demo.data import Bags, Split, Task, predict_all
from pydedup.demo.models import SPECS, Spec, build, embedding, logits
from pydedup.demo.packages import PACKAGES

__all__ = ["fit", "train_all"]

#: One thread: sums then do not depend on how they are split, and the steps are so small that a
#: second one waits more than it works (17 s against 23 s on two idle cores, 80 s on busy ones).
_THREADS = 1
_EPSILON = 1e-10
_KEY = "pydedup_demo_key"


def train_all(
    tasks: Mapping[str, Task],
    base: Tensor,
    cache: Path,
    console: Console,
    *,
    retrain: bool = False,
    specs: Mapping[str, Spec] | None = None,
) -> dict[str, nn.Sequential]:
    """Return every classifier by address, in eval mode, trained or from the cache.

    Parameters
    ----------
    tasks
        Corpora by name.
    base
        The base embedding with its padding row, see `models.base_table`; never written to.
    cache
        Folder for trained models; a checkpoint made by other code, settings or packages is
        trained anew, and so is one that cannot be read.
    console
        Where progress goes.
    retrain
        Train everything, whatever the cache holds.
    specs
        What to train, by address, if not ``SPECS``; a model comes after the one it continues.
    """
    specs = SPECS if specs is None else specs
    key = _key(specs)
    trained: dict[str, nn.Sequential] = {}
    with _threads(_THREADS), _training_bars(console) as bars:
        for name, spec in specs.items():
            path = cache / f"{name}.safetensors"
            task = tasks[spec.task]
            # A model that continues another is stale when the other was trained just now, but
            # then so is its key: the key covers the whole family.
            model = None if retrain else _load(path, key, base, spec, task)
            bar = bars.add_task(name, total=_steps(spec, task), note="")
            if model is None:
                model = _start(spec, trained, base, task)
                fit(model, task.train, spec, partial(_show, bars, bar, spec))
                _save(path, key, base, model)
            model.eval()
            outputs = predict_all(
                partial(logits, model), task.held_out.bags, len(task.classes), len(base) - 1
            )
            score = accuracy(outputs, task.held_out.labels)
            bars.update(bar, completed=_steps(spec, task), note=f"held-out accuracy {score:.4f}")
            trained[name] = model
    return trained


def fit(model: nn.Sequential, split: Split, spec: Spec, step: Callable[[int], None]) -> None:
    """Train ``model`` in place; ``step(epoch)`` is called after each batch."""
    table = embedding(model).weight
    dense = model[1:]
    trained = model if spec.dense else dense
    # Fused, one pass over a large table instead of ten.
    optimizer = torch.optim.AdamW(trained.parameters(), lr=spec.rate, fused=spec.dense)
    moved = torch.zeros(len(table))
    shuffle = np.random.default_rng(spec.seed)
    model.train()
    for epoch in range(spec.epochs):
        order = shuffle.permutation(len(split))
        for start in range(0, len(order), spec.batch):
            chosen = order[start : start + spec.batch]
            bags = split.bags.select(chosen)
            if spec.dense:
                vectors, words = table, torch.from_numpy(bags.ids)
            else:
                rows, words = _local(bags)
                vectors = table[rows].detach().requires_grad_(not spec.frozen)
            offsets = torch.from_numpy(bags.offsets)
            mean = functional.embedding_bag(words, vectors, offsets, mode="mean")
            loss = functional.cross_entropy(dense(mean), torch.from_numpy(split.labels[chosen]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if not spec.dense and vectors.grad is not None:
                _move_rows(table.data, moved, rows, vectors.grad, spec.row_rate)
            step(epoch)


def _local(bags: Bags) -> tuple[Tensor, Tensor]:
    """Return the distinct rows of a batch, and its words in terms of those."""
    rows, words = np.unique(bags.ids, return_inverse=True)
    return torch.from_numpy(rows), torch.from_numpy(words.reshape(-1))


def _move_rows(table: Tensor, moved: Tensor, rows: Tensor, grad: Tensor, rate: float) -> None:
    """Take one row-wise Adagrad step on the distinct ``rows``, in place."""
    moved.index_add_(0, rows, grad.square().mean(dim=1))
    scale = moved[rows].sqrt_().add_(_EPSILON)
    table.index_add_(0, rows, grad / scale.unsqueeze(1), alpha=-rate)


def _start(
    spec: Spec, trained: Mapping[str, nn.Sequential], base: Tensor, task: Task
) -> nn.Sequential:
    """Return the module that training starts from."""
    table = base if spec.further is None else embedding(trained[spec.further]).weight.data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = build(table, len(task.classes), frozen=spec.frozen)
    if spec.further is not None:
        model.load_state_dict(trained[spec.further].state_dict())
    return model


def _steps(spec: Spec, task: Task) -> int:
    return spec.epochs * -(-len(task.train) // spec.batch)


def _key(specs: Mapping[str, Spec]) -> str:
    """Return a digest of all that decides what is trained: packages, settings and code."""
    settings = {
        "packages": {name: package.sha256 for name, package in PACKAGES.items()},
        "specs": [asdict(spec) for spec in specs.values()],
        "code": [
            hashlib.sha256(Path(file).read_bytes()).hexdigest()
            for file in (data.__file__, models.__file__, __file__)
        ],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _save(path: Path, key: str, base: Tensor, model: nn.Sequential) -> None:
    """Write a checkpoint that holds the dense layers and only the rows that moved."""
    from safetensors.torch import save_file

    table = embedding(model).weight.data
    # Compared as integers: what counts is the bits.
    rows = (table.view(torch.int32) != base.view(torch.int32)).any(dim=1).nonzero().flatten()
    tensors = model.state_dict()
    del tensors["embedding.weight"]
    tensors |= {"moved.rows": rows, "moved.values": table[rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file(tensors, temporary, metadata={_KEY: key})
    temporary.replace(path)


def _load(path: Path, key: str, base: Tensor, spec: Spec, task: Task) -> nn.Sequential | None:
    """Return the model of a checkpoint, or ``None`` when there is none that fits."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get(_KEY) != key:
                return None
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    model = build(base, len(task.classes), frozen=spec.frozen)
    rows, values = state.pop("moved.rows"), state.pop("moved.values")
    model.load_state_dict(state, strict=False)
    if not spec.frozen:
        embedding(model).weight.data[rows] = values
    return model


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use so many threads, and afterwards what it used before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _show(bars: Progress, bar: TaskID, spec: Spec, epoch: int) -> None:
    bars.update(bar, advance=1, note=f"epoch {epoch + 1} of {spec.epochs}")


def _training_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description:<14}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
