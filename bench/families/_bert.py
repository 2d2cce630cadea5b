# SPDX-License-Identifier: Apache-2.0
"""A BERT encoder in plain torch, and its tokeniser: what MiniLM needs and no more.

The names of its parameters are those of published checkpoints. Texts become the mean of their
tokens' last states, as the sentence encoders of that family are used. No training here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Encoder", "Tokeniser", "batches", "padded"]

_WIDTH, _INNER, _HEADS, _LAYERS, _EPSILON = 384, 1536, 12, 6, 1e-12
_PIECE = re.compile(r"\w+|[^\w\s]")


class Tokeniser:
    """Lower case, accents dropped, split at punctuation, then the longest pieces known."""

    def __init__(self, vocabulary: Path) -> None:
        words = vocabulary.read_text(encoding="utf-8").splitlines()
        self._ids = {word: number for number, word in enumerate(words)}

    def __call__(self, text: str, most: int) -> list[int]:
        """Return at most so many ids, the marks at both ends included."""
        plain = unicodedata.normalize("NFD", text.lower())
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn").replace("_", " _ ")
        ids = [i for word in _PIECE.findall(plain) for i in self._pieces(word)]
        return [self._ids["[CLS]"], *ids[: most - 2], self._ids["[SEP]"]]

    def _pieces(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            for stop in range(len(word), start, -1):
                piece = word[start:stop] if start == 0 else "##" + word[start:stop]
                if piece in self._ids:
                    found.append(self._ids[piece])
                    start = stop
                    break
            else:
                return [self._ids["[UNK]"]]
        return found


class Encoder(nn.Module):
    """The encoder; its parameters have their published names."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            if "position_ids" in name or "pooler" in name:
                continue
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(value.clone()))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the mean state of each text's tokens; ``mask`` is false where there is none."""
        at = "embeddings."
        x = (
            self.get_parameter(at + "word_embeddings.weight")[ids]
            + self.get_parameter(at + "position_embeddings.weight")[: ids.shape[1]]
            + self.get_parameter(at + "token_type_embeddings.weight")[0]
        )
        x = self._normalised(x, at + "LayerNorm")
        for number in range(_LAYERS):
            x = self._layer(x, mask[:, None, None, :], f"encoder.layer.{number}.")
        kept = mask.unsqueeze(2).to(x.dtype)
        mean: Tensor = (x * kept).sum(1) / kept.sum(1)
        return mean

    def _layer(self, x: Tensor, mask: Tensor, at: str) -> Tensor:
        def heads(name: str) -> Tensor:
            y = self._dense(x, f"{at}attention.self.{name}")
            return y.view(*x.shape[:2], _HEADS, -1).transpose(1, 2)

        found = functional.scaled_dot_product_attention(
            heads("query"), heads("key"), heads("value"), attn_mask=mask
        )
        found = found.transpose(1, 2).reshape(x.shape)
        attended = x + self._dense(found, at + "attention.output.dense")
        x = self._normalised(attended, at + "attention.output.LayerNorm")
        inner = functional.gelu(self._dense(x, at + "intermediate.dense"))
        return self._normalised(
            x + self._dense(inner, at + "output.dense"), at + "output.LayerNorm"
        )

    def _dense(self, x: Tensor, at: str) -> Tensor:
        return functional.linear(
            x, self.get_parameter(at + ".weight"), self.get_parameter(at + ".bias")
        )

    def _normalised(self, x: Tensor, at: str) -> Tensor:
        return functional.layer_norm(
            x,
            (_WIDTH,),
            self.get_parameter(at + ".weight"),
            self.get_parameter(at + ".bias"),
            _EPSILON,
        )


def batches(
    texts: Sequence[Sequence[int]], size: int
) -> Iterator[tuple[np.ndarray[tuple[int], np.dtype[np.int64]], Tensor, Tensor]]:
    """Yield (rows, ids, mask), texts of like length together."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, *padded([texts[row] for row in rows])


def padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and where they are, of texts filled up to the longest."""
    longest = max(len(text) for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = True
    return ids, mask
