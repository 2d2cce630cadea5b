# SPDX-License-Identifier: Apache-2.0
"""Charts as SVG for a page: numbers in, markup out, with a text for those who cannot see them.

Everything is built as a tree and written by `xml.etree`, which escapes whatever names hold. Colours
are classes of the page's style sheet, so a chart follows its light or dark scheme.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from xml.etree import ElementTree as Tree

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from pydedup.sets import distinct
from pydedup.text import clean, plural, size

__all__ = ["block_picture", "heat_map", "histogram", "line_chart", "parts_bar", "swatch"]

#: Longer labels lose their middle; letters such as those of Chinese count twice.
_LABEL = 28
# Cells of this size have their number written in them.
_WIDE_CELL = 40
_SERIES = 6


def heat_map(
    labels: Sequence[str],
    shares: NDArray[np.float64],
    says: Callable[[int, int], str],
    *,
    diagonal: Sequence[bool],
    title: str,
    summary: str,
) -> Markup:
    """Return a square of cells, row i and column j coloured by ``shares[i, j]`` from 0 to 1.

    ``says`` returns the words of a cell; ``diagonal`` tells where one that meets itself is
    coloured. A label names its row, and its number the column.
    """
    n = len(labels)
    cell = _WIDE_CELL if n <= 16 else 26 if n <= 24 else 18
    left, top = 288, 28
    figure = _figure(left + n * cell + 8, top + n * cell + 8, title, summary, "map")
    for i, label in enumerate(labels):
        middle = top + i * cell + cell / 2
        name = _text(figure, _shortened(label, _LABEL), left - 40, middle, "label end")
        _add(name, "title", {}, clean(label))
        _text(figure, str(i + 1), left - 10, middle, "tick end")
        _text(figure, str(i + 1), left + i * cell + cell / 2, top - 12, "tick mid")
    for i in range(n):
        for j in range(n):
            share, x, y = float(shares[i, j]), left + j * cell, top + i * cell
            box = {
                "x": x,
                "y": y,
                "width": cell - 2,
                "height": cell - 2,
                "rx": 3,
                "class": "cell" if i != j or diagonal[i] else "cell same",
                "fill-opacity": f"{_visible(share):.3f}",
                "data-row": i,
                "data-column": j,
            }
            _add(_add(figure, "rect", box), "title", {}, clean(says(i, j)))
            if cell == _WIDE_CELL and (i != j or diagonal[i]) and share > 0:
                tone = "inside dark" if share > 0.55 else "inside"
                _text(figure, _percent(share), x + cell / 2 - 1, y + cell / 2 - 1, tone)
    return _markup(figure)


def histogram(
    counts: Sequence[int], labels: Sequence[str], *, title: str, summary: str, noun: str
) -> Markup:
    """Return bars, one per label."""
    width, height, left, bottom = 640, 220, 52, 44
    figure = _figure(width, height, title, summary, "chart")
    most = max([*counts, 1])
    ticks = _whole_ticks(most)
    top, base = 24, height - bottom
    scale = (base - top) / ticks[-1]
    for tick in ticks:
        _rule(figure, left, width - 8, base - tick * scale, f"{tick:,}")
    step = (width - left - 8) / len(counts)
    for i, (count, label) in enumerate(zip(counts, labels, strict=True)):
        x, tall = left + i * step, count * scale
        box = {"x": x + 3, "y": base - tall, "width": step - 6, "height": tall, "rx": 2}
        bar = _add(figure, "rect", {**box, "class": "bar", "data-count": count})
        _add(bar, "title", {}, f"{label}: {plural(count, noun)}")
        _text(figure, label, x + step / 2, base + 16, "tick mid")
        if count:
            _text(figure, f"{count:,}", x + step / 2, base - tall - 9, "value mid")
    _text(figure, title, (left + width) / 2, height - 8, "axis mid")
    return _markup(figure)


def line_chart(
    x: Sequence[int],
    series: dict[str, Sequence[float]],
    *,
    title: str,
    summary: str,
    x_title: str,
    y_title: str,
) -> Markup:
    """Return lines over bytes on a logarithmic axis; ``y`` is from 0 to 1."""
    width, height, left, right, top, bottom = 720, 340, 56, 110, 16, 52
    figure = _figure(width, height, title, summary, "chart")
    base, low = height - bottom, math.log(max(x[0], 1))
    span = max(math.log(max(x[-1], 1)) - low, 1e-9)

    def across(value: float) -> float:
        return left + (width - left - right) * (math.log(value) - low) / span

    def down(value: float) -> float:
        return base - value * (base - top)

    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        _rule(figure, left, width - right, down(tick), f"{tick:.0%}")
    for value in _spread(x, 6):
        _text(figure, size(value), across(value), base + 16, "tick mid")
    _text(figure, x_title, (left + width - right) / 2, height - 10, "axis mid")
    turned = f"translate(12 {(top + base) / 2:.1f}) rotate(-90)"
    _add(figure, "text", {"transform": turned, "class": "axis mid"}, y_title)
    for number, (name, values) in enumerate(series.items()):
        points = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in zip(x, values, strict=True))
        kind = f"line s{number % _SERIES}"
        line = _add(figure, "polyline", {"points": points, "class": kind, "data-series": name})
        _add(line, "title", {}, name)
        # The legend.
        at = top + 8 + number * 20
        ends = {"x1": width - right + 12, "x2": width - right + 34, "y1": at, "y2": at}
        _add(figure, "line", {**ends, "class": kind})
        _text(figure, name, width - right + 40, at, "label")
    return _markup(figure)


def block_picture(cells: NDArray[np.uint8], *, summary: str) -> Markup:
    """Return cells coloured by their kind (class ``k0``, ``k1``, ...), 255 for none; no axes."""
    rows, cols = cells.shape
    if not cells.size:
        return Markup("")
    unit = 10
    figure = _figure(cols * unit, rows * unit, "", summary, "blocks")
    for kind in distinct(cells[cells != 255]).tolist():
        strokes = []
        for row in range(rows):
            edges = np.flatnonzero(np.diff(cells[row] == kind, prepend=False, append=False)) * unit
            for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                strokes.append(f"M{start} {row * unit}H{stop}v{unit - 1}H{start}z")
        _add(figure, "path", {"d": "".join(strokes), "class": f"k{kind}"})
    gaps = "".join(f"M{col * unit - 0.5} 0V{rows * unit}" for col in range(1, cols + 1))
    _add(figure, "path", {"d": gaps, "class": "gaps"})
    return _markup(figure)


def parts_bar(
    parts: Sequence[tuple[str, int]], whole: int, *, summary: str, width: int = 140
) -> Markup:
    """Return one bar whose parts (class, amount) lie on a ground as long as the whole."""
    height = 12
    figure = _figure(width, height, "", summary, "parts")
    scale = width / max(whole, sum(amount for _, amount in parts), 1)
    ground = {"x": 0, "y": 0, "width": whole * scale, "height": height, "rx": 3}
    _add(figure, "rect", {**ground, "class": "ground"})
    x = 0.0
    for kind, amount in parts:
        part = {"x": x, "y": 0, "width": amount * scale, "height": height, "class": kind}
        _add(figure, "rect", part)
        x += amount * scale
    return _markup(figure)


def swatch(kind: str, opacity: float = 1.0) -> Markup:
    """Return a square in the colour of a class, for a legend."""
    figure = Tree.Element("svg", {"viewBox": "0 0 14 14", "aria-hidden": "true"})
    box: dict[str, object] = {"x": 0.5, "y": 0.5, "width": 13, "height": 13, "rx": 3, "class": kind}
    if opacity < 1.0:
        box["fill-opacity"] = f"{opacity:.2f}"
    _add(figure, "rect", box)
    return _markup(figure)


# ---- inside -------------------------------------------------------------------------------------


def _figure(width: float, height: float, title: str, summary: str, kind: str) -> Tree.Element:
    return Tree.Element(
        "svg",
        {
            "viewBox": f"0 0 {_number(width)} {_number(height)}",
            "width": _number(width),
            "height": _number(height),
            "class": kind,
            "role": "img",
            "aria-label": clean(f"{title}. {summary}" if title else summary),
        },
    )


def _add(
    parent: Tree.Element, tag: str, attributes: Mapping[str, object], text: str | None = None
) -> Tree.Element:
    child = Tree.SubElement(
        parent,
        tag,
        {
            key: _number(value) if isinstance(value, float) else str(value)
            for key, value in attributes.items()
        },
    )
    child.text = text
    return child


def _text(parent: Tree.Element, text: str, x: float, y: float, kind: str) -> Tree.Element:
    return _add(parent, "text", {"x": float(x), "y": float(y), "class": kind}, text)


def _rule(parent: Tree.Element, start: float, stop: float, y: float, label: str) -> None:
    """Draw a line of the grid with what it stands for at its left."""
    _add(parent, "line", {"x1": start, "x2": stop, "y1": y, "y2": y, "class": "grid"})
    _text(parent, label, start - 8, y, "tick end")


def _markup(figure: Tree.Element) -> Markup:
    # Escaped by the tree; an empty element is closed by a tag of its own, as HTML wants it.
    text = Tree.tostring(figure, encoding="unicode", short_empty_elements=False)
    return Markup(text)


def _visible(share: float) -> float:
    """Return an opacity: what is shared at all can be told from what is not."""
    return 0.0 if share <= 0 else 0.1 + 0.9 * share


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.005 else "<1"


def _shortened(text: str, room: int) -> str:
    shown = clean(text)
    if sum(map(_cells, shown)) <= room:
        return shown
    # Ends are taken in turns while there is room for them beside the ellipsis.
    head, tail, left = "", "", room - 1
    while True:
        front = len(head) <= len(tail)
        char = shown[len(head)] if front else shown[-1 - len(tail)]
        left -= _cells(char)
        if left < 0:
            return f"{head}…{tail}"
        head, tail = (head + char, tail) if front else (head, char + tail)


def _cells(char: str) -> int:
    return 2 if unicodedata.east_asian_width(char) in "FW" else 1


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _whole_ticks(most: int) -> list[int]:
    """Return some whole numbers from 0 to at least ``most``."""
    power = 10 ** max(len(str(most)) - 1, 0)
    step = next(s for s in (power // 5, power // 2, power, 2 * power) if s and most <= 5 * s)
    return list(range(0, most + step, step))


def _spread(values: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the values, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
