# SPDX-License-Identifier: Apache-2.0
"""Predictions from a graph whose weights stay in the store. Needs no framework.

Weights of ``linear``, ``conv2d``, ``embedding`` and ``embedding_bag`` are streamed; vectors (bias,
norms) are read whole, once per run. What is streamed computes in float32, or float64 where the
weights are; all else in float64 where its inputs are, else in float32. The functions follow torch,
NaN and infinities included. Deliberately not here: where graphs come from (:mod:`pydedup.graph`),
which also says what each operation means.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup.errors import ArgumentError
from pydedup.graph import Graph, Node
from pydedup.matmul import widened
from pydedup.serving.stacks import Stacks, fusable
from pydedup.serving.tensor import StoredTensor, matmul_together
from pydedup.serving.weightless import WEIGHTLESS, activation_of, checked_axis, real
from pydedup.words import Activation

__all__ = [
    "Tensors",
    "check_inputs",
    "from_front",
    "run_graph",
    "run_together",
    "until_last",
    "without_padding",
]

_Array: TypeAlias = NDArray[Any]
#: Returns a tensor of a model by name.
Tensors: TypeAlias = Callable[[str], StoredTensor]


def run_graph(
    graph: Graph,
    tensors: Tensors,
    inputs: Mapping[str, ArrayLike],
    stacks: Stacks | None = None,
) -> dict[str, _Array]:
    """Compute the outputs of a graph.

    Parameters
    ----------
    graph
        The layers.
    tensors
        Returns a tensor of the model by name.
    inputs
        An array for each of the graph's inputs. Ids and offsets must be integers.
    stacks
        What may run some of the layers together; for them alone, of this model and graph.

    Returns
    -------
    dict
        An array for each of the graph's outputs.

    Raises
    ------
    ArgumentError
        When inputs are missing, unknown or do not fit the layers; the message names the node.
    """
    return run_together(graph, [(tensors, inputs)], stacks)[0]


def run_together(
    graph: Graph,
    runs: Sequence[tuple[Tensors, Mapping[str, ArrayLike]]],
    stacks: Stacks | None = None,
) -> list[dict[str, _Array]]:
    """Compute the outputs of one graph for several models and inputs, layer by layer.

    Blocks that the weights of products have in common are used once for all runs. ``stacks`` are
    those of the model of the only run. Raises what `run_graph` does, for whichever run it is.
    """
    states = [_Run(tensors, graph, inputs) for tensors, inputs in runs]
    fused: dict[str, Node] | None = None
    made = set(graph.inputs)
    with np.errstate(all="ignore"):  # NaN and infinities are results here, not mistakes
        for node, used_up in zip(graph.nodes, graph.used_up, strict=True):
            if node.output in made:
                pass
            elif stacks is not None and (ran := stacks.run(node.output, states[0].values)):
                chain, value = ran
                states[0].values[chain.output] = value
                made.update(chain.made)
            else:
                fused = fusable(graph) if fused is None else fused
                follower = fused.get(node.output)
                activation = None if follower is None else activation_of(follower)
                to = node.output if follower is None else follower.output
                for state, value in zip(states, _compute(states, node, activation), strict=True):
                    state.values[to] = value
                made.add(to)
            for name in used_up:
                for state in states:
                    state.values.pop(name, None)
        return [{name: _output(graph, state, name) for name in graph.outputs} for state in states]


def _output(graph: Graph, run: _Run, name: str) -> _Array:
    value = np.asarray(run.values[name])
    return value.astype(np.float16, copy=False) if name in graph.halves else value


def check_inputs(given: Collection[str], taken: Collection[str]) -> None:
    """Raise ArgumentError unless the names of inputs are those that a model takes."""
    unknown = [name for name in given if name not in taken]
    missing = [name for name in taken if name not in given]
    if unknown or missing:
        problem = f"unknown input {unknown[0]!r}" if unknown else f"input {missing[0]!r} is missing"
        raise ArgumentError(f"{problem}; the model takes: {', '.join(taken)}")


def _compute(states: Sequence[_Run], node: Node, activation: Activation | None) -> list[_Array]:
    """Compute a node in all runs, followed by an activation."""
    try:
        if node.op == "linear":
            return _linear(states, node, activation)
        if node.op == "conv2d":
            return [state.conv2d(node, activation) for state in states]
        return [
            _OPS[node.op](state, node, *(state.values[name] for name in node.inputs))
            for state in states
        ]
    except ArgumentError as exc:
        raise ArgumentError(f"node {node.op!r} that makes {node.output!r}: {exc}") from exc
    except ValueError as exc:  # numpy: axes or shapes that do not go together
        shapes = ", ".join(str(states[0].values[name].shape) for name in node.inputs)
        raise ArgumentError(
            f"node {node.op!r} that makes {node.output!r} does not fit inputs of shape "
            f"{shapes}: {exc}"
        ) from exc


def _linear(states: Sequence[_Run], node: Node, activation: Activation | None) -> list[_Array]:
    bias = node.weights.get("bias")
    return matmul_together(
        [state.tensor(node.weights["weight"]) for state in states],
        [state.values[node.inputs[0]] for state in states],
        [None if bias is None else state.vector(bias) for state in states],
        activation=activation,
        transpose=bool(node.attr("transpose")),
    )


class _Run:
    """One run: the values of it so far, the tensors and what was read of them."""

    def __init__(self, tensors: Tensors, graph: Graph, inputs: Mapping[str, ArrayLike]) -> None:
        check_inputs(inputs, graph.inputs)
        self.tensor = tensors
        self.values: dict[str, _Array] = {name: np.asarray(inputs[name]) for name in graph.inputs}
        self._vectors: dict[str, _Array] = {}

    def vector(self, name: str) -> _Array:
        """Return a whole tensor to compute with."""
        if name not in self._vectors:
            self._vectors[name] = widened(self.tensor(name).numpy())
        return self._vectors[name]

    def conv2d(self, node: Node, activation: Activation | None) -> _Array:
        bias = node.weights.get("bias")
        return self.tensor(node.weights["weight"]).conv2d(
            self.values[node.inputs[0]],
            bias=None if bias is None else self.vector(bias),
            stride=node.attr("stride"),
            padding=node.attr("padding"),
            dilation=node.attr("dilation"),
            groups=node.attr("groups"),
            activation=activation,
        )

    def embedding(self, node: Node, ids: _Array) -> _Array:
        weight = self.tensor(node.weights["weight"])
        if node.attr("from_end") and ids.dtype.kind == "i":
            ids = from_front(ids.astype(np.int64, copy=False), weight.shape[0])
        return widened(weight.take(ids))

    def embedding_bag(self, node: Node, ids: _Array, offsets: _Array | None = None) -> _Array:
        weight = self.tensor(node.weights["weight"])
        if offsets is not None and node.attr("include_last_offset"):
            ids, offsets = until_last(ids, offsets)
        padding = node.attr("padding_idx")
        if padding is not None and weight.shape[0]:  # `bag` refuses any id of an empty table
            ids, offsets, _ = without_padding(ids, offsets, padding % weight.shape[0])
        return weight.bag(ids, offsets, node.attr("mode"))

    def layer_norm(self, node: Node, x: _Array) -> _Array:
        x = real(x)
        weight = self.vector(node.weights["weight"])
        if x.shape[-weight.ndim :] != weight.shape:
            raise ArgumentError(f"x has shape {x.shape}; its last axes must be {weight.shape}")
        axes = tuple(range(-weight.ndim, 0))
        centred = x - x.mean(axis=axes, keepdims=True)
        variance = np.square(centred).mean(axis=axes, keepdims=True)
        scaled: _Array = centred / np.sqrt(variance + node.attr("eps"))
        return np.asarray(scaled * weight + self.vector(node.weights["bias"]))

    def batch_norm(self, node: Node, x: _Array) -> _Array:
        x = real(x)
        axis = checked_axis(node.attr("axis"), x)
        vectors = {role: self.vector(name) for role, name in node.weights.items()}
        if x.shape[axis] != len(vectors["weight"]):
            raise ArgumentError(
                f"x has shape {x.shape}; axis {axis} must have {len(vectors['weight'])} entries"
            )
        along = [1] * x.ndim
        along[axis] = -1
        weight, bias, mean, var = (
            vectors[role].reshape(along) for role in ("weight", "bias", "mean", "var")
        )
        scale = weight / np.sqrt(var + node.attr("eps"))
        # Of the widest of them, as the result then is.
        scaled = x * scale.astype(np.result_type(scale, bias, mean), copy=False)
        scaled += bias - mean * scale
        return np.asarray(scaled)


def from_front(ids: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return ids of ``count`` rows, of which negative ones, as far as there are, are of the end."""
    return np.where((ids < 0) & (ids >= -count), ids + count, ids)


def until_last(ids: _Array, offsets: _Array) -> tuple[_Array, _Array]:
    """Return ids and offsets whose last offset, the end of the last bag, was applied."""
    if offsets.ndim != 1 or len(offsets) == 0 or offsets.dtype.kind not in "iu":
        raise ArgumentError(
            "with include_last_offset, offsets must be 1-D integers and hold at least the end of "
            f"the last bag; got {offsets.dtype} of shape {offsets.shape}"
        )
    end = int(offsets[-1])
    if ids.ndim != 1 or not 0 <= end <= len(ids):
        raise ArgumentError(f"the last bag cannot end at {end} of ids of shape {ids.shape}")
    return ids[:end], offsets[:-1]


def without_padding(
    ids: _Array, offsets: _Array | None, padding: int, factors: _Array | None = None
) -> tuple[_Array, _Array | None, _Array | None]:
    """Return bags as 1-D ids and offsets, and factors, without the entries that are padding.

    What fits no bags stays as it is: `StoredTensor.bag` says what is wrong.
    """
    as_given = ids, offsets, factors
    if ids.dtype.kind not in "iu" or (factors is not None and factors.shape != ids.shape):
        return as_given
    if offsets is None:
        if ids.ndim != 2:
            return as_given
        starts = np.arange(ids.shape[0]) * ids.shape[1]
    else:
        if ids.ndim != 1 or offsets.ndim != 1 or offsets.dtype.kind not in "iu":
            return as_given
        if offsets.size and not 0 <= offsets.min() <= offsets.max() <= len(ids):
            return as_given
        starts = offsets.astype(np.int64)
    flat = ids.reshape(-1)
    dropped = np.flatnonzero(flat == padding)
    kept = None if factors is None else np.delete(factors.reshape(-1), dropped)
    return np.delete(flat, dropped), starts - np.searchsorted(dropped, starts), kept


def _weightless(compute: Callable[..., _Array]) -> Callable[..., _Array]:
    return lambda run, node, *inputs: compute(node, *inputs)


_OPS: Mapping[str, Callable[..., _Array]] = {
    "embedding": _Run.embedding,
    "embedding_bag": _Run.embedding_bag,
    "layer_norm": _Run.layer_norm,
    "batch_norm": _Run.batch_norm,
    **{op: _weightless(compute) for op, compute in WEIGHTLESS.items()},
}
