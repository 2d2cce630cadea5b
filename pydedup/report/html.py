# SPDX-License-Identifier: Apache-2.0
"""A report of a store as one page of HTML, which loads nothing and runs nothing.

The page has no script, and says so itself (Content-Security-Policy): whatever a name holds, it is
text. Not here: the numbers (`gather`), the charts (`charts`).
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import NDArray

from pydedup import text
from pydedup.certificates import describe, largest_error
from pydedup.replacement import POLICIES
from pydedup.report import charts
from pydedup.report.curves import OPTIMUM, Curves
from pydedup.report.detail import Kind, TensorBlocks, picture
from pydedup.report.families import families
from pydedup.report.gather import FILL_BINS, Detail, ModelLine, StoreReport

__all__ = ["render"]

#: Models that are listed, rows of the heat map, tensors of a model, and so on.
_MOST_LINES, _MOST_CELLS, _MOST_TENSORS, _MOST_PAIRS = 100, 40, 60, 20
_MOST_CERTIFICATES, _MOST_CALLED = 50, 15
_PICTURE_COLUMNS, _PICTURE_ROWS = 48, 12
_FOLDER = Path(__file__).parent
_EXACT = ("exact", "lossless")
_PROMISES = {
    "exact": "the same bits; only identical blocks are shared",
    "lossless": "the same bits; also lossless deltas and compressed blocks",
    "bounded": "each block within a relative error that was chosen",
    "accuracy": "a model whose own metric fell by no more than was allowed",
}


def render(report: StoreReport) -> str:
    """Return the page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        size=text.size,
        count=text.count,
        plural=text.plural,
        percent=text.percent,
        saved=text.saved,
        moment=text.moment,
        clean=text.clean,
        breakable=_breakable,
    )
    css = (_FOLDER / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    template = environment.from_string((_FOLDER / "page.html").read_text(encoding="utf-8"))
    lines, rest = _lines(report.models)
    certificates, more_certificates = _certificates(report.models)
    return template.render(
        version=importlib.metadata.version("pydedup"),
        css=Markup(css),
        css_hash=f"sha256-{digest}",
        made_at=report.made_at,
        stats=report.stats,
        steps=_steps(report),
        lines=lines,
        rest=rest,
        bar=_bar,
        swatch=charts.swatch,
        heat=_heat(report),
        pairs=_pairs(report),
        kinds=list(Kind),
        details=[_detail(detail) for detail in report.details],
        hidden_details=_hidden(report),
        fill=_fill(report.page_fill),
        policies=_policies(report.models),
        certificates=certificates,
        more_certificates=more_certificates,
        cache=_cache(report),
    )


# ---- sizes --------------------------------------------------------------------------------------


def _steps(report: StoreReport) -> list[dict[str, Any]]:
    stats = report.stats
    steps = [
        ("Weights as given", stats.logical_bytes, "marginal"),
        ("Blocks that models use, each once", report.used_bytes, "shared"),
        ("Pages that hold them", stats.page_bytes, "shared"),
        ("The database around them", stats.stored_bytes, "shared"),
    ]
    whole = max(amount for _, amount, _ in steps)
    return [
        {
            "words": words,
            "bytes": amount,
            "part": text.percent(amount / stats.logical_bytes) if stats.logical_bytes else "-",
            "bar": charts.parts_bar(
                [(kind, amount)], whole, summary=f"{words}: {text.size(amount)}", width=320
            ),
        }
        for words, amount, kind in steps
    ]


def _lines(models: Sequence[ModelLine]) -> tuple[list[ModelLine], dict[str, Any] | None]:
    if len(models) <= _MOST_LINES:
        return sorted(models, key=lambda line: (line.info.name, line.info.id)), None
    ordered = sorted(models, key=lambda line: (-line.info.logical_bytes, line.info.id))
    others = ordered[_MOST_LINES:]
    return ordered[:_MOST_LINES], {
        "words": f"{text.plural(len(others), 'smaller model')} more",
        "logical": sum(line.info.logical_bytes for line in others),
        "marginal": sum(line.marginal_bytes for line in others),
    }


def _bar(line: ModelLine) -> Markup:
    logical = line.info.logical_bytes
    part = f" of {text.size(logical)}"
    return charts.parts_bar(
        [("shared", line.shared_bytes), ("marginal", line.marginal_bytes)],
        logical,
        summary=f"shared {text.size(line.shared_bytes)}, "
        f"marginal {text.size(line.marginal_bytes)}{part}",
    )


# ---- sharing ------------------------------------------------------------------------------------


def _heat(report: StoreReport) -> dict[str, Any] | None:
    common = report.common
    names = [report.models[number].info.address for number in common.readers]
    if len(names) < 2:
        return None
    every = families(common.blocks, _MOST_CELLS)
    largest = sorted(range(len(every)), key=lambda at: (-len(every[at]), at))[:_MOST_CELLS]
    groups = [every[at] for at in sorted(largest)]
    labels = [_family(names, group) for group in groups]
    means = _mean_shares(common.shares, groups)

    def says(i: int, j: int) -> str:
        a, b = groups[i], groups[j]
        if len(a) == len(b) == 1:
            mine, both = common.blocks[a[0], a[0]], common.blocks[a[0], b[0]]
            if i == j:
                return f"{labels[i]}: {text.plural(int(mine), 'block')}"
            part = text.percent(float(means[i, j]))
            return f"{labels[i]}: {both:,} of its {mine:,} blocks ({part}) are in {labels[j]} too"
        if i == j and len(a) > 1:
            return f"{labels[i]}: {text.percent(float(means[i, j]))} among themselves, on average"
        return f"{labels[i]}: {text.percent(float(means[i, j]))} are in {labels[j]} too, on average"

    chart = charts.heat_map(
        labels,
        means,
        says,
        diagonal=[len(group) > 1 for group in groups],
        title="How many of each model's blocks other models use",
        summary=f"{len(labels)} rows and columns. " + _summary_of(means, labels),
    )
    left_out = len(report.models) - len(names)
    return {"words": _heat_words(len(names), len(every), groups, left_out), "chart": chart}


def _heat_words(
    n_models: int, n_families: int, shown: Sequence[Sequence[int]], left_out: int
) -> str:
    """Say what the heat map shows; ``left_out`` models were not compared."""
    words = (
        "A row says how many of that model's blocks, in percent, the model of each column uses "
        "too; `pydedup explain` also says how many bytes these are. Models that have much in "
        "common are side by side."
    )
    if n_families < n_models:
        words = (
            f"The {n_models:,} models in {n_families:,} families of what has most in common. A "
            "row says how many of a model's blocks, in percent, a model of the column's family "
            "uses too, on average; where a family meets itself, among its own models."
        )
    if len(shown) < n_families:
        members = text.plural(sum(map(len, shown)), "model")
        words += f" The {len(shown)} largest, with {members}, are shown."
    if left_out:
        words += f" {text.plural(left_out, 'smaller model')} of this store are not in it."
    return words


def _mean_shares(
    shares: NDArray[np.float64], groups: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    """Return what models of one group share with others of another, or of their own, on average."""
    member = np.zeros((len(groups), len(shares)))
    for row, group in enumerate(groups):
        member[row, group] = 1.0
    sizes = member.sum(axis=1)
    counts = np.outer(sizes, sizes)
    sums = member @ shares @ member.T
    np.fill_diagonal(sums, np.diagonal(sums) - sizes)  # without each model's share of itself
    np.fill_diagonal(counts, sizes * (sizes - 1))
    return np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)


def _family(names: Sequence[str], group: Sequence[int]) -> str:
    if len(group) == 1:
        return names[group[0]]
    return f"{names[min(group)]} +{len(group) - 1:,}"


def _summary_of(means: NDArray[np.float64], labels: Sequence[str]) -> str:
    off = means.copy()
    np.fill_diagonal(off, -1.0)
    i, j = divmod(int(off.argmax()), len(labels))
    return f"Most is {text.percent(float(off[i, j]))}: of {labels[i]} in {labels[j]}."


def _pairs(report: StoreReport) -> list[dict[str, Any]]:
    common = report.common
    upper = np.triu(common.blocks, 1)
    best = np.argsort(-upper, axis=None, kind="stable")[:_MOST_PAIRS]
    found = []
    for i, j in (divmod(int(at), len(upper)) for at in best):
        if not upper[i, j]:
            break
        found.append(
            {
                "first": report.models[common.readers[i]].info.address,
                "second": report.models[common.readers[j]].info.address,
                "blocks": int(upper[i, j]),
                "of_first": float(upper[i, j] / common.blocks[i, i]),
                "of_second": float(upper[i, j] / common.blocks[j, j]),
            }
        )
    return found


# ---- blocks -------------------------------------------------------------------------------------


def _breakable(name: str) -> Markup:
    """Return a name whose lines end after its dots and the like, not anywhere, where they can."""
    return Markup(re.sub(r"[./_](?=.)", r"\g<0><wbr>", str(escape(name))))


def _detail(detail: Detail) -> dict[str, Any]:
    tensors = sorted(detail.tensors, key=lambda tensor: -tensor.blocks)
    shown = set(map(id, tensors[:_MOST_TENSORS]))
    others = tensors[_MOST_TENSORS:]
    return {
        "address": detail.address,
        "words": _in_words(detail.tensors),
        "rows": [_tensor(tensor) for tensor in detail.tensors if id(tensor) in shown],
        "rest": {
            "words": f"{text.plural(len(others), 'smaller tensor')} more",
            **_sums(others),
        }
        if others
        else None,
    }


def _sums(tensors: Sequence[TensorBlocks]) -> dict[str, int]:
    return {
        "blocks": sum(tensor.blocks for tensor in tensors),
        "shared": sum(tensor.shared for tensor in tensors),
        "deltas": sum(tensor.deltas for tensor in tensors),
    }


def _in_words(tensors: Sequence[TensorBlocks]) -> str:
    sums = _sums(tensors)
    return (
        f"{text.plural(len(tensors), 'tensor')}, {text.plural(sums['blocks'], 'block')}, "
        f"{sums['shared']:,} shared, {text.plural(sums['deltas'], 'delta')}"
    )


def _tensor(tensor: TensorBlocks) -> dict[str, Any]:
    info = tensor.tensor
    most = f", with up to {text.plural(tensor.most_others, 'other')}" if tensor.most_others else ""
    return {
        "name": info.name,
        "shape": f"{info.dtype.label} {text.shape(info.shape)}",
        "blocks": tensor.blocks,
        "shared": tensor.shared,
        "deltas": tensor.deltas,
        "chart": charts.block_picture(
            picture(tensor.kinds, _PICTURE_COLUMNS, _PICTURE_ROWS),
            summary=f"{tensor.shared:,} of {text.plural(tensor.blocks, 'block')} shared{most}; "
            f"{text.plural(tensor.deltas, 'delta')}",
        ),
    }


def _hidden(report: StoreReport) -> str:
    if len(report.models) <= len(report.details):
        return ""
    shown = len(report.details)
    return f"These are {shown:,} of {len(report.models):,} models."


# ---- pages and guarantees -----------------------------------------------------------------------


def _fill(bins: Sequence[int]) -> Markup:
    if not sum(bins):
        return Markup("<p>No models, no pages.</p>")
    step = 100 // FILL_BINS
    labels = [f"{i * step}-{(i + 1) * step} %" for i in range(FILL_BINS)]
    full = f"At least {100 - step} % full: {bins[-1]:,} of {text.plural(sum(bins), 'page')}"
    return charts.histogram(
        bins, labels, title="Filled to", summary=f"Histogram of pages. {full}.", noun="page"
    )


def _policies(models: Sequence[ModelLine]) -> list[dict[str, Any]]:
    rows = []
    for policy, count in Counter(line.info.policy for line in models).most_common():
        mine = [line for line in models if line.info.policy == policy]
        largest = max(largest_error(line.certificate) for line in mine)
        rows.append(
            {
                "policy": policy,
                "models": count,
                "bytes": sum(line.info.logical_bytes for line in mine),
                "largest": f"{largest:.3g} of its norm" if largest else "none",
                "words": _PROMISES.get(policy, "see the models' certificates"),
            }
        )
    return rows


def _certificates(models: Sequence[ModelLine]) -> tuple[list[dict[str, Any]], str]:
    lossy = [line for line in models if line.info.policy not in _EXACT]
    rows = [
        {"address": line.info.address, "lines": describe(line.certificate)}
        for line in lossy[:_MOST_CERTIFICATES]
    ]
    hidden = len(lossy) - len(rows)
    more = f"And {text.plural(hidden, 'more certificate')}." if hidden else ""
    return rows, more


# ---- cache --------------------------------------------------------------------------------------


def _cache(report: StoreReport) -> dict[str, Any] | None:
    curves = report.curves
    if curves is None:
        return None
    notes = []
    if not report.trace_complete:
        notes.append("The recording was full before it ended: later uses are not in it.")
    if curves.replayed < curves.uses:
        notes.append(f"Of this long trace the first {curves.replayed:,} uses were replayed.")
    if curves.uses and report.trace_known < 1.0:
        part = text.percent(1.0 - report.trace_known)
        notes.append(
            f"{part} of the pages in the trace are not in this store: it is of another store, or "
            "pages have moved since."
        )
    words = (
        f"{text.plural(curves.uses, 'use')} of {text.plural(curves.pages, 'page')} "
        f"({text.size(curves.page_bytes)}) in {text.plural(curves.calls, 'call')}, replayed "
        "through a pool that is empty at first: the part of the uses that would have been misses."
    )
    total = sum(called.calls for called in report.called)
    return {
        "words": words,
        "notes": notes,
        "chart": _miss_chart(curves) if curves.uses else None,
        "policies": list(curves.ratios),
        "rows": [
            {"memory": size, "ratios": [values[i] for values in curves.ratios.values()]}
            for i, size in enumerate(curves.memory)
        ],
        "meanings": list(POLICIES.items()),
        "called": [
            {"address": called.address, "calls": called.calls, "part": called.calls / total}
            for called in report.called[:_MOST_CALLED]
        ],
    }


def _miss_chart(curves: Curves) -> Markup:
    middle = len(curves.memory) // 2
    best = min(POLICIES, key=lambda policy: curves.ratios[policy][middle])
    return charts.line_chart(
        curves.memory,
        {str(policy): ratios for policy, ratios in curves.ratios.items()},
        title="Misses by memory",
        summary=f"With {text.size(curves.memory[middle])}, {best} misses "
        f"{text.percent(curves.ratios[best][middle])} of the uses, the optimum "
        f"{text.percent(curves.ratios[OPTIMUM][middle])}.",
        x_title="memory of the pool (logarithmic)",
        y_title="misses by uses",
    )
