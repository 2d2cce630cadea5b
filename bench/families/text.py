# SPDX-License-Identifier: Apache-2.0
"""Six real text classifiers over the GloVe table, and two of them trained further, in one store.

    python bench/families/text.py [--quick]

Each model's accuracy may fall by one point, shown at 95 % confidence on its validation texts. The
table that they all started from is not in the store unless it says so: the first classifier comes
first and the others find it. What is added up is the SQLite file, first model included.
"""

from __future__ import annotations

import argparse

from _classifiers import FURTHER, SIX, Family, scorer, trained
from _measure import Member, Result, console, family_table, options, store_family

from pydedup import policies

#: What a family's file must be below, as a share of the raw models (issue 4).
TARGETS = {"row-wise": 1 / 4.5, "dense": 1 / 4.0}


def members(family: Family, names: tuple[str, ...], max_drop: float = 0.01) -> list[Member]:
    """Return what to store of the models with these names."""
    found = []
    for name in names:
        model, corpus = family.models[name], family.corpus(name)
        evaluate = policies.torch_evaluate(model, scorer(corpus.validation))
        found.append(
            Member(
                name,
                {key: value.numpy().copy() for key, value in model.state_dict().items()},
                policies.Accuracy(evaluate, max_drop, confidence=0.95),
                policies.torch_evaluate(model, scorer(corpus.task.held_out)),
            )
        )
    return found


def report(result: Result, target: float | None = None) -> None:
    console.print(family_table(result))
    mean, half = result.mean_drop()
    share = result.file_bytes / result.logical
    verdict = ""
    if target is not None:
        verdict = f"; wanted 1/{1 / target:.2f}: {'reached' if share <= target else 'MISSED'}"
    console.print(
        f"  1/{1 / share:.2f} of the raw models{verdict}; mean held-out drop "
        f"{100 * mean:+.2f} points, 95 % interval {100 * (mean - half):+.2f} to "
        f"{100 * (mean + half):+.2f}\n"
    )


def run(chosen: argparse.Namespace) -> None:
    for which, target in list(TARGETS.items())[: 1 if chosen.quick else 2]:
        names = SIX[:4] if chosen.quick else SIX + FURTHER
        family = trained(which, chosen.cache, console, names)
        all_members = members(family, names)
        report(
            store_family(f"{which}, {min(len(names), 6)} classifiers", all_members[:6]),
            None if chosen.quick else target,
        )
        if chosen.quick:
            continue
        report(store_family(f"{which}, with two trained further", all_members, tell=False))
        base = Member("glove@1", {"embedding.weight": family.base.numpy()}, policies.Lossless())
        report(
            store_family(f"{which}, the plain table first", [base, *all_members[:6]], tell=False)
        )


if __name__ == "__main__":
    run(options(__doc__))
