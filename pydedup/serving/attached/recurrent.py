# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers: loaded where the budget allows it, else streamed step by step.

A step needs all weights, so that streaming reads them as often as a sequence has steps; loading
them is better until they are large. The equations are those of torch's documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from pydedup.serving.attached.parameter import StoredParameter, are_loaded, handles

__all__: list[str] = []

_Tensor = torch.Tensor
_State = tuple[torch.Tensor, ...]
#: One step: the input's part of the gates, the state and the weights, to the state behind it.
_Step = Callable[[torch.Tensor, _State, Sequence[Any]], _State]

#: Layers of more than this part of the budget are not loaded.
_LOADED_PART = 4


def _lstm_step(gates: torch.Tensor, state: _State, weights: Sequence[Any]) -> _State:
    h, c = state
    w_hh, b_hh, w_hr = weights
    i, f, g, o = (gates + linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else linear(h, w_hr)), c


def _gru_step(gates: torch.Tensor, state: _State, weights: Sequence[Any]) -> _State:
    (h,) = state
    xr, xz, xn = gates.chunk(3, -1)
    hr, hz, hn = linear(h, weights[0], weights[1]).chunk(3, -1)
    z = (xz + hz).sigmoid()
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return ((1 - z) * n + z * h,)


def _tanh_step(gates: torch.Tensor, state: _State, weights: Sequence[Any]) -> _State:
    return ((gates + linear(state[0], weights[0], weights[1])).tanh(),)


def _relu_step(gates: torch.Tensor, state: _State, weights: Sequence[Any]) -> _State:
    return ((gates + linear(state[0], weights[0], weights[1])).relu(),)


def _register(layer: Any, cell: Any, step: _Step) -> None:
    @handles(layer)
    def run(input: torch.Tensor, *arguments: Any) -> Any:
        # Of a packed sequence, how many rows each step has comes first, and no batch_first last.
        is_packed = isinstance(arguments[2], list | tuple)
        packed_rows, hx, weights, *options = arguments if is_packed else (None, *arguments)
        if _can_be_loaded(weights):
            return NotImplemented
        has_biases, n_layers, _, _, is_bidirectional = options[:5]
        state = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
        how = (state, list(weights), has_biases, n_layers, is_bidirectional)
        if is_packed:
            y, state = _layers(step, input, packed_rows.tolist(), *how)
            return y, *state
        batch_first = options[5]
        x = input.transpose(0, 1) if batch_first else input
        y, state = _layers(step, x.flatten(0, 1), [x.shape[1]] * len(x), *how)
        y = y.reshape(*x.shape[:2], y.shape[-1])
        return (y.transpose(0, 1) if batch_first else y), *state

    @handles(cell)
    def run_cell(
        input: torch.Tensor, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
    ) -> Any:
        state = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
        after = step(linear(input, w_ih, b_ih), state, (w_hh, b_hh, None))
        return after if len(after) > 1 else after[0]


def _can_be_loaded(weights: Sequence[Any]) -> bool:
    """Load all weights where they take a small part of the budget, and return whether they are."""
    stored = [weight for weight in weights if type(weight) is StoredParameter]
    nbytes = sum(weight.slot.nbytes for weight in stored)
    return are_loaded(stored, nbytes, _LOADED_PART)


def _layers(
    step: _Step,
    x: torch.Tensor,
    n_rows: list[int],
    state: _State,
    weights: list[Any],
    has_biases: bool,
    n_layers: int,
    is_bidirectional: bool,
) -> tuple[torch.Tensor, _State]:
    """Run all layers over (rows of all steps, features); return the outputs and the states behind.

    Of the batch, step t has the first ``n_rows[t]`` rows, never more than the step before it.
    """
    n_directions = 2 if is_bidirectional else 1
    n_each = len(weights) // (n_layers * n_directions)
    last: list[_State] = []
    for layer in range(n_layers):
        outputs = []
        for direction in range(n_directions):
            number = layer * n_directions + direction
            own = weights[number * n_each : (number + 1) * n_each]
            w_ih, w_hh = own[:2]
            b_ih, b_hh = own[2:4] if has_biases else (None, None)
            w_hr = own[-1] if n_each % 2 else None  # of a projection
            gates = torch.split(linear(x, w_ih, b_ih), n_rows)
            here: _State = tuple(part[number] for part in state)
            made = []
            for part in reversed(gates) if direction else gates:
                n = len(part)
                after = step(part, tuple(h[:n] for h in here), (w_hh, b_hh, w_hr))
                made.append(after[0])
                # Sequences that have ended, or, backwards, not yet begun, keep their state.
                here = tuple(torch.cat((new, h[n:])) for new, h in zip(after, here, strict=True))
            outputs.append(torch.cat(made[::-1] if direction else made))
            last.append(here)
        x = torch.cat(outputs, -1)
    return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))


for _layer, _cell, _step in (
    (torch.lstm, torch.lstm_cell, _lstm_step),
    (torch.gru, torch.gru_cell, _gru_step),
    (torch.rnn_tanh, torch.rnn_tanh_cell, _tanh_step),
    (torch.rnn_relu, torch.rnn_relu_cell, _relu_step),
):
    _register(_layer, _cell, _step)
