# SPDX-License-Identifier: Apache-2.0
"""What a run of a graph will need, known before it begins: shapes, memory, whether rows are apart.

Rows are apart where an output's row depends on the same row of the inputs alone: such batches may
be cut to fit a budget, and requests may be put together. Deliberately not here: messages for inputs
that do not fit, which the engine gives where it meets them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup.graph import Graph, Node
from pydedup.matmul import compute_dtype
from pydedup.operations import axes_of, flattened_from, reshaped_to
from pydedup.types import DType, TensorInfo

__all__ = [
    "Bags",
    "Plan",
    "Shape",
    "bytes_of_factor",
    "is_planned_by_shapes",
    "plan_run",
    "shape_after",
    "widening",
]

Shape: TypeAlias = tuple[int, ...]

# Arrays of the size of its result that an operation needs beside it, for a while.
_SCRATCH = {"softmax": 2, "log_softmax": 2, "layer_norm": 2, "batch_norm": 1, "elu": 2, "gelu": 1}
# Bytes of a number of x as products want it: on AMX three bf16 numbers for one of f32.
_PER_FACTOR = 6
# Operations whose result is a view of their input.
_VIEWS = {"identity", "flatten", "reshape", "transpose"}
# Bytes beside its result that a look-up needs: ids as the core wants them, and without padding;
# where bags begin, and how many ids they have.
_PER_ID, _PER_BAG = 8, 32


@dataclass(frozen=True, slots=True, eq=False)
class Bags:
    """Ids of bags one after the other, and where each begins: two inputs, to be cut together."""

    ids: str
    offsets: str
    #: Where each bag begins in the ids, and where the last one ends.
    edges: NDArray[np.int64]
    #: Whether the offsets say where the last one ends.
    with_end: bool

    def ids_of(self, first: int, stop: int) -> int:
        """Return how many ids these bags have."""
        return int(self.edges[stop] - self.edges[first])


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one run needs.

    Attributes
    ----------
    rows
        Length of the first axis of all inputs and outputs, where rows are apart; else None.
    nbytes
        The most bytes that activations take at one time, scratch included, inputs not.
    out_nbytes
        Bytes of the outputs.
    bags
        Inputs that have no row for each row of the others, but a bag of ids.
    fits
        Whether the inputs fit all nodes. If not, this is what runs before the first that they do
        not fit.
    """

    rows: int | None
    nbytes: int
    out_nbytes: int
    bags: Sequence[Bags] = ()
    fits: bool = True

    def beyond(self, nbytes: int) -> int:
        """Return how many bytes more than so many the smallest pieces take, beside the outputs."""
        if self.nbytes <= nbytes:
            return 0
        if self.rows is None or self.rows < 2:
            return max(self.nbytes - nbytes - self.out_nbytes, 0)
        shares = [(1, self.rows)]
        shares += [(int(np.diff(one.edges).max()), int(one.edges[-1])) for one in self.bags]
        row = max(self.nbytes * part // max(whole, 1) for part, whole in shares)
        return max(row - nbytes, 0)

    def fits_in(self, nbytes: int) -> bool:
        """Whether it runs as a whole where pieces may take so much."""
        return self.nbytes <= nbytes or self.rows is None or self.rows < 2

    def end(self, first: int, nbytes: int) -> int:
        """Return where a piece of about so many bytes ends that begins here; it has a row."""
        assert self.rows is not None
        stop = first + self.rows * nbytes // self.nbytes
        for bags in self.bags:
            ids = int(bags.edges[-1]) * nbytes // self.nbytes
            most = int(bags.edges[first]) + ids
            stop = min(stop, int(np.searchsorted(bags.edges, most, side="right")) - 1)
        return min(max(stop, first + 1), self.rows)

    def share(self, first: int, stop: int) -> int:
        """Return how many bytes these rows take: their part of all rows or ids, if it is larger."""
        assert self.rows is not None
        shares = [(stop - first, self.rows)]
        shares += [(bags.ids_of(first, stop), int(bags.edges[-1])) for bags in self.bags]
        return max(self.nbytes * part // max(whole, 1) for part, whole in shares)

    def part(
        self, inputs: Mapping[str, NDArray[Any]], first: int, stop: int
    ) -> dict[str, NDArray[Any]]:
        """Return these rows of the inputs."""
        part = {name: value[first:stop] for name, value in inputs.items()}
        for bags in self.bags:
            edges = bags.edges[first : stop + 1]
            part[bags.ids] = inputs[bags.ids][edges[0] : edges[-1]]
            part[bags.offsets] = (edges if bags.with_end else edges[:-1]) - edges[0]
        return part


def plan_run(
    graph: Graph, tensor: Callable[[str], TensorInfo], inputs: Mapping[str, NDArray[Any]]
) -> Plan | None:
    """Return what a run with these inputs needs, or None when one is missing."""
    shapes: dict[str, Shape] = {name: inputs[name].shape for name in graph.inputs if name in inputs}
    if len(shapes) < len(graph.inputs):
        return None
    bags = _bags(graph, inputs)
    of_bags = {one.ids for one in bags}
    counts = {one.offsets: len(one.edges) - 1 for one in bags}
    lengths = {
        counts.get(name, shape[0] if shape else -1)
        for name, shape in shapes.items()
        if name not in of_bags
    }
    apart = dict.fromkeys(shapes, len(lengths) == 1 and -1 not in lengths)
    wide = any(value.dtype.itemsize == 8 and value.dtype.kind == "f" for value in inputs.values())
    itemsize = {name: inputs[name].dtype.itemsize for name in shapes}
    root = {name: name for name in graph.inputs}  # whose memory a value is
    last_use = _last_uses(graph, root)
    live: dict[str, int] = {}
    most = 0
    for i, node in enumerate(graph.nodes):
        given = [shapes[name] for name in node.inputs]
        try:
            weight = tensor(node.weights["weight"]) if "weight" in node.weights else None
            shape = shape_after(node, given, () if weight is None else weight.shape)
        except (ValueError, IndexError, ZeroDivisionError):
            return Plan(None, most, 0, fits=False)
        wide = wide or any(
            compute_dtype(tensor(name).dtype).itemsize == 8 for name in widening(node)
        )
        shapes[node.output] = shape
        apart[node.output] = all(apart[name] for name in node.inputs) and (
            node.inputs[0] in of_bags or _keeps_rows(node, given, shape)
        )
        width = 8 if wide else 4
        if node.op in _VIEWS or node.op == "concat":  # ids stay ids
            width = max(itemsize[name] for name in node.inputs)
        itemsize[node.output] = width
        if root[node.output] == node.output:
            live[node.output] = math.prod(shape) * width
        most = max(most, sum(live.values()) + _scratch(node, given[0], shape, width))
        for name in [name for name in live if last_use[name] <= i]:
            del live[name]
    # Of all values: a node that no output needs is run, and must fit the pieces, too.
    rows = lengths.pop() if all(apart.values()) else None
    itemsize.update(dict.fromkeys(graph.halves, 2))
    out_nbytes = sum(math.prod(shapes[name]) * itemsize[name] for name in graph.outputs)
    most = max(most, sum(live.values()) + (out_nbytes if graph.halves else 0))
    return Plan(rows, most, out_nbytes, bags)


def _scratch(node: Node, x: Shape, shape: Shape, width: int) -> int:
    """Return the bytes that an operation needs beside its result, for a while."""
    if node.op == "linear":
        return math.prod(x) * max(width, _PER_FACTOR)
    if node.op == "conv2d":
        return math.prod(x) * width  # x as the kernels want it
    if node.op == "embedding":
        return math.prod(x) * _PER_ID
    if node.op == "embedding_bag":
        copies = 1 if node.attr("padding_idx") is None else 2
        return copies * math.prod(x) * _PER_ID + shape[0] * _PER_BAG
    return _SCRATCH.get(node.op, 0) * math.prod(shape) * width


def bytes_of_factor(x: NDArray[Any], weights: DType, *, transpose: bool) -> int:
    """Return the most bytes that a product takes beside x and its result: x as kernels want it."""
    if x.itemsize == 2 and weights is DType.BF16 and not transpose:
        return x.size * 4  # as it is, or widened and a part of it packed
    width = compute_dtype(weights).itemsize
    widened = 0 if x.itemsize == width else width
    return x.size * (widened + max(width, _PER_FACTOR))


def is_planned_by_shapes(graph: Graph) -> bool:
    """Return whether what a run needs depends on shapes and dtypes alone: it has no offsets."""
    return all(node.op != "embedding_bag" or len(node.inputs) == 1 for node in graph.nodes)


def _bags(graph: Graph, inputs: Mapping[str, NDArray[Any]]) -> list[Bags]:
    """Return all bags with offsets, if each can be cut: nothing else looks at ids or offsets."""
    found: dict[str, Bags] = {}
    elsewhere = set(graph.outputs)
    for node in graph.nodes:
        if node.op != "embedding_bag" or len(node.inputs) == 1:
            elsewhere.update(node.inputs)
            continue
        ids, offsets = node.inputs
        with_end = bool(node.attr("include_last_offset"))
        edges = _edges(inputs.get(ids), inputs.get(offsets), with_end)
        if edges is None:
            return []
        one = found.setdefault(ids, Bags(ids, offsets, edges, with_end))
        if (one.offsets, one.with_end) != (offsets, with_end):
            return []
    ends = {(one.offsets, one.with_end) for one in found.values()}
    names = [*found, *(offsets for offsets, _ in ends)]
    if len(set(names)) < len(names) or not elsewhere.isdisjoint(names):
        return []
    return list(found.values())


def _edges(
    ids: NDArray[Any] | None, offsets: NDArray[Any] | None, with_end: bool
) -> NDArray[np.int64] | None:
    """Return where bags begin, and where the last one ends; None where something is wrong."""
    if ids is None or offsets is None or ids.ndim != 1 or offsets.ndim != 1:
        return None
    if offsets.dtype.kind not in "iu":
        return None
    edges = offsets.astype(np.int64)
    if not with_end:
        edges = np.append(edges, len(ids))
    wrong = len(edges) == 0 or edges[0] != 0 or edges[-1] > len(ids)
    return None if wrong or bool((edges[1:] < edges[:-1]).any()) else edges


def _last_uses(graph: Graph, root: dict[str, str]) -> dict[str, int]:
    """Say whose memory each value is, and when that is used last: outputs are to the end."""
    last: dict[str, int] = {}
    moved: set[str] = set()  # whose elements do not lie in order
    for i, node in enumerate(graph.nodes):
        first = node.inputs[0]
        copies = node.op in ("reshape", "flatten") and first in moved
        root[node.output] = root[first] if node.op in _VIEWS and not copies else node.output
        if node.op == "transpose" or (node.op == "identity" and first in moved):
            moved.add(node.output)
        for name in (*node.inputs, node.output):
            last[root[name]] = i
    for name in graph.outputs:
        last[root[name]] = len(graph.nodes)
    return last


def shape_after(node: Node, given: Sequence[Shape], weight: Shape) -> Shape:
    """Return the shape of a node's result, in which sizes that nobody knows are -1.

    Raises ValueError, IndexError or ZeroDivisionError where there is none.
    """
    x = given[0]
    match node.op:
        case "linear":
            return (*x[:-1], weight[-1] if node.attr("transpose") else weight[0])
        case "embedding":
            return (*x, *weight[1:])
        case "embedding_bag":
            if len(given) == 1:
                return (x[0], *weight[1:])
            count = given[1][0]
            if node.attr("include_last_offset") and count != -1:
                count -= 1
                if count < 0:
                    raise ValueError("there is no last offset")
            return (count, *weight[1:])
        case "conv2d":
            kernel = weight[2:] if len(weight) == 4 else (1, weight[2])
            return (*x[:-3], weight[0], *_windows(node, x, kernel))
        case "max_pool2d" | "avg_pool2d":
            return (*x[:-2], *_windows(node, x, tuple(node.attr("kernel"))))
        case "flatten":
            start = flattened_from(node.attr("start_axis"), x)
            return (*x[:start], _product(x[start:]))
        case "reshape":
            return _reshaped(x, reshaped_to(node.attr("shape"), x))
        case "transpose":
            return tuple(x[axis] for axis in node.attr("perm"))
        case "concat":
            axis = node.attr("axis") % len(x)
            along = [shape[axis] for shape in given]
            return (*x[:axis], -1 if -1 in along else sum(along), *x[axis + 1 :])
        case "mean" | "max":
            axes = {axis % len(x) for axis in axes_of(node.attr("axis"))}
            kept = bool(node.attr("keepdims"))
            return tuple(
                1 if axis in axes else size
                for axis, size in enumerate(x)
                if kept or axis not in axes
            )
        case "add" | "sub" | "mul":
            return _stretched(x, given[1])
    return x


def widening(node: Node) -> Sequence[str]:
    """Return the tensors any of which makes the result float64; the bias of a product does not."""
    if node.op in ("linear", "conv2d"):
        return (node.weights["weight"],)
    return tuple(node.weights.values())


def _keeps_rows(node: Node, given: list[Shape], shape: Shape) -> bool:
    """Return whether row i of the result comes from row i of each input, and is at its place."""
    x = given[0]
    if not x or not shape:  # one number has no rows
        return False
    match node.op:
        case "linear" | "relu" | "gelu" | "silu" | "sigmoid" | "tanh" | "leaky_relu" | "elu":
            return len(x) > 1 or node.op != "linear"
        case "embedding" | "softplus" | "identity":
            return True
        case "embedding_bag":
            return len(given) == 1 and len(x) == 2
        case "conv2d" | "max_pool2d" | "avg_pool2d":
            return len(x) == 4
        case "softmax" | "log_softmax" | "concat":
            return bool(node.attr("axis") % len(x) != 0)
        case "mean" | "max":
            return all(axis % len(x) != 0 for axis in axes_of(node.attr("axis")))
        case "layer_norm":
            return bool(int(node.attr("axes")) < len(x))
        case "batch_norm":
            return bool(node.attr("axis") % len(x) != 0)
        case "flatten":
            return flattened_from(node.attr("start_axis"), x) > 0
        case "reshape":
            wanted = node.attr("shape")
            return bool(wanted) and wanted[0] in (-1, 0) and shape[0] == x[0]
        case "transpose":
            return bool(node.attr("perm")[0] == 0)
        case "add" | "sub" | "mul":
            return len({len(other) for other in given}) == 1 and len({s[0] for s in given}) == 1
    return False


def _windows(node: Node, x: Shape, kernel: Shape) -> Shape:
    """Return how many windows an image has from top to bottom and from left to right."""
    if len(x) < 3:
        raise ValueError("no image")
    padding = node.attr("padding")
    dilation = [1, 1] if node.op == "avg_pool2d" else node.attr("dilation")
    counts = []
    for axis, size in enumerate(x[-2:]):
        room = size + padding[axis] + padding[axis + 2] - dilation[axis] * (kernel[axis] - 1)
        stride = node.attr("stride")[axis]
        ceil = node.op != "conv2d" and node.attr("ceil_mode")
        count = (-(-(room - 1) // stride) if ceil else (room - 1) // stride) + 1
        if ceil and (count - 1) * stride >= size + padding[axis]:
            count -= 1  # the last window begins in the image, or before it
        if size != -1 and count < 1:
            raise ValueError("no window fits")
        counts.append(-1 if size == -1 else count)
    return tuple(counts)


def _reshaped(x: Shape, wanted: list[int]) -> Shape:
    total = _product(x)
    if total == -1:
        return tuple(wanted)
    free = total // math.prod(size for size in wanted if size != -1) if -1 in wanted else 0
    shape = tuple(free if size == -1 else size for size in wanted)
    if math.prod(shape) != total:
        raise ValueError("sizes differ")
    return shape


def _stretched(x: Shape, y: Shape) -> Shape:
    """Return the shape that two are broadcast to."""
    if -1 not in x + y:
        return np.broadcast_shapes(x, y)
    rank = max(len(x), len(y))
    pairs = zip((1,) * (rank - len(x)) + x, (1,) * (rank - len(y)) + y, strict=True)
    return tuple(b if a == 1 or (a == -1 and b > 1) else a for a, b in pairs)


def _product(sizes: Shape) -> int:
    return -1 if -1 in sizes else math.prod(sizes)
