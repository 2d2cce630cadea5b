# SPDX-License-Identifier: Apache-2.0
"""Which dense layers of a graph may run as one, and the stacks of models that are small.

A stack gives the same bits as its layers one by one; it only leaves out what is between them. Where
it cannot run, as when a page is not in memory, the engine takes its layers one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, TypeAlias

from numpy.typing import NDArray

from pydedup.catalog import StoredModel
from pydedup.errors import PydedupError
from pydedup.graph import Graph, Node
from pydedup.matmul import compute_dtype, widened
from pydedup.pool import PagePool
from pydedup.serving.tensor import TensorOf
from pydedup.serving.weightless import activation_of
from pydedup.stack import Layer, Stack

__all__ = ["Stacks", "chains", "fusable", "known_stacks", "stacks_of"]

_Array: TypeAlias = NDArray[Any]

#: Bytes of the biases of a model that are kept beside the budget.
_MOST_BIAS_BYTES: Final = 1 << 16


class Chain:
    """Products of a graph that follow each other, each perhaps with an activation behind it.

    Attributes
    ----------
    steps
        These nodes.
    input, output
        The value that the first takes, and the one that the last makes.
    made
        All values that they make.
    """

    __slots__ = ("input", "made", "output", "steps")

    def __init__(self, steps: Sequence[tuple[Node, Node | None]]) -> None:
        nodes = [node for step in steps for node in step if node is not None]
        self.steps = tuple(steps)
        self.input = nodes[0].inputs[0]
        self.output = nodes[-1].output
        self.made = frozenset(node.output for node in nodes)


@dataclass(frozen=True, slots=True)
class Stacks:
    """What runs some chains of a model, by the value that the first node of each makes.

    ``whole`` is the value of the first node where one chain is all of the graph.
    """

    found: Mapping[str, tuple[Chain, Stack]]
    pool: PagePool
    whole: str | None = None

    def run_whole(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, _Array] | None:
        """Return the output of a graph that is one chain, None where it is not or cannot run."""
        if self.whole is None or list(inputs) != [self.found[self.whole][0].input]:
            return None
        ran = self.run(self.whole, inputs)
        return None if ran is None else {ran[0].output: ran[1]}

    def run(self, first: str, values: Mapping[str, NDArray[Any]]) -> tuple[Chain, _Array] | None:
        """Return the chain that begins there and what it gives, None where it cannot run."""
        chain, stack = self.found.get(first, (None, None))
        if chain is None or stack is None:
            return None
        y = stack.run(self.pool, values[chain.input])
        return None if y is None else (chain, y)


def fusable(graph: Graph) -> dict[str, Node]:
    """Return, per output of a product that only an activation uses, that activation."""
    users = _users(graph)
    return {
        node.output: users[node.output][0]
        for node in graph.nodes
        if node.op in ("linear", "conv2d")
        and _is_used_once(node.output, graph, users)
        and activation_of(users[node.output][0]) is not None
    }


def chains(graph: Graph) -> list[Chain]:
    """Return the dense layers of a graph; those are together whose results only the next takes."""
    users, fused = _users(graph), fusable(graph)
    found: list[Chain] = []
    begun: set[str] = set()
    for first in graph.nodes:
        if first.op != "linear" or first.output in begun:
            continue
        steps: list[tuple[Node, Node | None]] = []
        node = first
        while True:
            follower = fused.get(node.output)
            steps.append((node, follower))
            begun.add(node.output)
            end = node.output if follower is None else follower.output
            if not _is_used_once(end, graph, users) or users[end][0].op != "linear":
                break
            node = users[end][0]
        found.append(Chain(steps))
    return found


def known_stacks(model: StoredModel) -> Stacks | None:
    """Return `stacks_of` if they are there, and one of them is all of the model."""
    state, stacks = model.memo.get(_MEMO, (None, None))
    return stacks if state == model.state and stacks is not None and stacks.whole else None


def stacks_of(
    model: StoredModel,
    graph: Graph,
    tensor_of: TensorOf,
    pool: PagePool,
) -> Stacks:
    """Return what runs chains of a model whose pages, all together, are those of one window.

    Nothing for a model that is asked for the first time: its pages have to be read.
    """
    state, stacks = model.memo.get(_MEMO, (None, None))
    if state != model.state:
        model.memo[_MEMO] = model.state, None
        return Stacks({}, pool)
    if stacks is None:
        try:
            made = _made(model, graph, tensor_of, pool)
        except PydedupError:  # the engine meets it, and says what it is
            return Stacks({}, pool)
        stacks = Stacks(made, pool, _whole(graph, made))
        model.memo[_MEMO] = state, stacks
    found: Stacks = stacks
    return found


# ---- inside -------------------------------------------------------------------------------------


#: Of a model, what runs chains of it in one state of its pages; None: not looked for.
_MEMO: Final = "stacks"


def _made(
    model: StoredModel,
    graph: Graph,
    tensor_of: TensorOf,
    pool: PagePool,
) -> dict[str, tuple[Chain, Stack]]:
    made: dict[str, tuple[Chain, Stack]] = {}
    pages, bias_bytes = 0, 0
    for chain in chains(graph):
        layers = [_layer(model, *step, tensor_of) for step in chain.steps]
        if not _fit(layers):
            continue
        stack = Stack(layers, pool)
        pages += stack.n_pages
        bias_bytes += stack.bias_bytes
        if pages > pool.window_pages or bias_bytes > _MOST_BIAS_BYTES:
            return {}
        made[chain.steps[0][0].output] = chain, stack
    return made


def _whole(graph: Graph, made: Mapping[str, tuple[Chain, Stack]]) -> str | None:
    """Return the first value of a chain that is all of a graph, None where none is."""
    if len(made) != 1 or graph.halves:
        return None
    ((first, (chain, _)),) = made.items()
    ends = list(graph.inputs), list(graph.outputs)
    is_whole = ends == ([chain.input], [chain.output]) and len(chain.made) == len(graph.nodes)
    return first if is_whole else None


def _layer(
    model: StoredModel,
    node: Node,
    activation: Node | None,
    tensor_of: TensorOf,
) -> Layer:
    block_map = model.block_map(node.weights["weight"])
    bias = None
    if "bias" in node.weights:
        bias = widened(tensor_of(model, node.weights["bias"]).numpy())
    return Layer(
        block_map,
        bias,
        None if activation is None else activation_of(activation),
        bool(node.attr("transpose")),
    )


def _fit(layers: list[Layer]) -> bool:
    """Whether each takes what the one before gives."""
    dtypes = {compute_dtype(layer.block_map.dtype) for layer in layers}
    return len(dtypes) == 1 and all(
        one.outer == following.inner for one, following in pairwise(layers)
    )


def _users(graph: Graph) -> dict[str, list[Node]]:
    users: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)
    return users


def _is_used_once(name: str, graph: Graph, users: Mapping[str, list[Node]]) -> bool:
    return len(users.get(name, ())) == 1 and name not in graph.outputs
