# SPDX-License-Identifier: Apache-2.0
"""The family of text classifiers that the demo trains, and how one is applied to text.

All of them are plain ``torch.nn.Sequential`` modules on the same GloVe table: the mean of a
text's word vectors, a dense layer of 64, a dense layer of one output per class. Their tables have
one row more than GloVe, of zeros, which stands for no word, so that texts of unlike length make a
rectangle. Some keep the table as it is, some move the rows of the words they are trained on, and
one is another one trained further. How they are trained is in ``train.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pydedup.demo.data import Rows

__all__ = ["SPECS", "Spec", "base_table", "build", "embedding", "logits"]

_HIDDEN = 64


@dataclass(frozen=True, slots=True)
class Spec:
    """What one classifier is trained on, and how.

    ``row_rate`` is the learning rate of the embedding's rows; 0 keeps the table frozen. With
    ``dense`` the whole table learns as the dense layers do, at ``rate``, whatever ``row_rate`` is.
    ``further`` names the model that training starts from, instead of the plain table.
    """

    name: str
    task: str
    epochs: int
    batch: int
    rate: float
    row_rate: float
    seed: int
    further: str | None = None
    dense: bool = False

    @property
    def frozen(self) -> bool:
        """Whether the embedding table stays as it was published."""
        return self.row_rate == 0.0 and not self.dense


#: By address in the store; a model comes after the one it continues.
SPECS: Mapping[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("imdb@1", "imdb", epochs=2, batch=64, rate=1e-3, row_rate=0.03, seed=1),
        Spec(
            "imdb@2", "imdb", epochs=2, batch=64, rate=5e-4, row_rate=0.01, seed=2, further="imdb@1"
        ),
        Spec("imdb-frozen@1", "imdb", epochs=6, batch=64, rate=3e-3, row_rate=0.0, seed=3),
        Spec("rt@1", "rt", epochs=3, batch=64, rate=1e-3, row_rate=0.03, seed=4),
        Spec("rt-frozen@1", "rt", epochs=6, batch=64, rate=3e-3, row_rate=0.0, seed=5),
        Spec("bbc@1", "bbc", epochs=8, batch=32, rate=3e-3, row_rate=0.1, seed=6),
        Spec("bbc-frozen@1", "bbc", epochs=15, batch=32, rate=5e-3, row_rate=0.0, seed=7),
    )
}


def base_table(vectors: NDArray[np.float32]) -> Tensor:
    """Return word vectors, f32 (words, width), with the padding row of zeros below them."""
    return torch.from_numpy(np.concatenate([vectors, np.zeros_like(vectors[:1])]))


def build(table: Tensor, classes: int, *, frozen: bool) -> nn.Sequential:
    """Return a classifier on a table that ends with the padding row, dense layers at random.

    A frozen table is used where it lies, so that any number of models holds it once; another one
    is copied. Random numbers come from torch's global generator.
    """
    bag = nn.EmbeddingBag.from_pretrained(
        table if frozen else table.clone(), freeze=frozen, mode="mean", padding_idx=len(table) - 1
    )
    return nn.Sequential(
        OrderedDict(
            embedding=bag,
            hidden=nn.Linear(bag.embedding_dim, _HIDDEN),
            relu=nn.ReLU(),
            output=nn.Linear(_HIDDEN, classes),
        )
    )


def embedding(model: nn.Sequential) -> nn.EmbeddingBag:
    """Return the embedding layer of a classifier."""
    layer = model.get_submodule("embedding")
    assert isinstance(layer, nn.EmbeddingBag)
    return layer


def logits(model: nn.Sequential, ids: Rows) -> NDArray[np.float32]:
    """Return the outputs for padded texts (texts, words), computed by torch in memory."""
    with torch.inference_mode():
        outputs: NDArray[np.float32] = model(torch.from_numpy(ids)).numpy()
    return outputs
