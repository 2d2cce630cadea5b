# SPDX-License-Identifier: Apache-2.0
"""MiniLM's forward pass, as little of it as it takes to compare two sets of weights; its export.

Not a library: WordPiece of lower-cased words, mean pooling, one sentence at a time.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

__all__ = ["cosines", "export", "optimise"]

HEADS, LAYERS, TOKENS = 12, 6, 128


def cosines(
    weights: Mapping[str, NDArray[Any]],
    others: Mapping[str, NDArray[Any]],
    vocabulary: str,
    sentences: Sequence[str],
) -> NDArray[np.float64]:
    """Return the cosine of each sentence's two embeddings."""
    words = {word: number for number, word in enumerate(vocabulary.splitlines())}
    tokens = [_tokens(sentence, words) for sentence in sentences]
    with torch.inference_mode():
        a, b = (
            torch.stack([_embedding(given, ids) for ids in tokens])
            for given in (_tensors(weights), _tensors(others))
        )
        alike: NDArray[np.float64] = functional.cosine_similarity(a, b).numpy()
    return alike


def export(weights: Mapping[str, NDArray[Any]], path: Path, *, any_size: bool = False) -> None:
    """Write an ONNX graph of the encoder with these weights, as PyTorch's exporter does.

    It takes one sentence of eight words, or as many of each as it is given.
    """
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=1536,
        attn_implementation="eager",
    )
    encoder = BertModel(config).eval()
    parameters = {name for name, _ in encoder.named_parameters()}
    encoder.load_state_dict(
        {name: torch.from_numpy(array) for name, array in weights.items() if name in parameters}
    )

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.encoder(input_ids=ids, attention_mask=mask)[0]
            return hidden

    some = torch.ones(1, 8, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a tracer that does not follow Python
        names = ["ids", "mask"]
        axes = {name: {0: "rows", 1: "words"} for name in names}
        torch.onnx.export(
            Hidden(),
            (some, some),
            path,
            input_names=names,
            dynamic_axes=axes if any_size else None,
            dynamo=False,
            verbose=False,
        )


def optimise(graph: Path, path: Path) -> None:
    """Write an exported graph as ONNX Runtime's tool optimises it: attention in one node each.

    Its queries, keys and values are one matrix then.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    made = optimize_model(str(graph), "bert", num_heads=HEADS, hidden_size=384, opt_level=0)
    if made.get_fused_operator_statistics()["Attention"] != LAYERS:
        raise SystemExit("ONNX Runtime's tool did not fuse the attention of each layer")
    made.save_model_to_file(str(path))


def _tensors(weights: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    # In f64, so that what is measured is the weights and not the rounding of the products.
    return {
        name: torch.from_numpy(np.array(array, np.float64))
        for name, array in weights.items()
        if np.issubdtype(array.dtype, np.floating)
    }


def _tokens(sentence: str, words: Mapping[str, int]) -> list[int]:
    plain = unicodedata.normalize("NFD", sentence.lower())
    plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
    ids = [words["[CLS]"]]
    for word in re.findall(r"\w+|[^\w\s]", plain):
        ids += _pieces(word, words)
    return [*ids[: TOKENS - 1], words["[SEP]"]]


def _pieces(word: str, words: Mapping[str, int]) -> list[int]:
    ids, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        for stop in range(len(word), start, -1):
            number = words.get(prefix + word[start:stop])
            if number is not None:
                ids.append(number)
                start = stop
                break
        else:
            return [words["[UNK]"]]
    return ids


def _embedding(weights: Mapping[str, torch.Tensor], ids: Sequence[int]) -> torch.Tensor:
    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], scale, shift, 1e-12)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), HEADS, -1).transpose(0, 1)

    x = weights["embeddings.word_embeddings.weight"][list(ids)]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        query, key, value = (
            heads(linear(x, f"{layer}.attention.self.{part}")) for part in ("query", "key", "value")
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(0, 1).reshape(x.shape)
        attention = f"{layer}.attention.output"
        x = norm(x + linear(mixed, f"{attention}.dense"), f"{attention}.LayerNorm")
        inner = functional.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return functional.normalize(x.mean(0), dim=0)
