# SPDX-License-Identifier: Apache-2.0
"""Every kind of layer, attached, against torch with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import pydedup
from pydedup.errors import ArgumentError

torch = pytest.importorskip("torch")
nn = torch.nn

Check = Callable[..., set[str]]

MANY = settings(max_examples=15)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


@MANY
@given(
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    lead=st.lists(st.integers(0, 5), max_size=2),
    bias=st.booleans(),
)
def test_linear(check: Check, sizes: tuple[int, int], lead: list[int], bias: bool) -> None:
    assert check(nn.Linear(*sizes, bias=bias), torch.randn(*lead, sizes[0])) == set()


def test_linear_with_inputs_that_are_views(check: Check) -> None:
    check(nn.Linear(40, 30), torch.randn(40, 9).t())
    check(nn.Linear(40, 30), torch.randn(9, 80)[:, ::2])
    check(nn.Linear(40, 30), torch.randn(1, 40).expand(5, 40))


@MANY
@given(
    rows=st.integers(1, 300),
    width=st.integers(1, 90),
    shape=st.lists(st.integers(0, 6), max_size=3),
    padding=st.booleans(),
    data=st.data(),
)
def test_embedding(
    check: Check,
    rows: int,
    width: int,
    shape: list[int],
    padding: bool,
    data: Any,
) -> None:
    layer = nn.Embedding(rows, width, padding_idx=0 if padding else None)
    ids = torch.randint(
        0, rows, shape, dtype=data.draw(st.sampled_from([torch.int64, torch.int32]))
    )
    assert check(layer, ids) == set()


def test_embedding_with_a_largest_norm(store: pydedup.Store) -> None:
    # torch shrinks the rows of its own table when it looks them up.
    table = torch.randn(40, 12)
    ids = torch.arange(40).view(4, 10)
    layer = nn.Embedding.from_pretrained(table.clone(), max_norm=3.0, norm_type=1.5).eval()
    store.add("m", layer)
    wanted = layer(ids)
    assert not torch.allclose(wanted, table[ids])
    torch.testing.assert_close(store.attach(layer, "m")(ids), wanted)


@pytest.mark.parametrize("used", [torch.float64, torch.bfloat16])
def test_a_bag_with_a_largest_norm_in_another_dtype(store: pydedup.Store, used: Any) -> None:
    layer = nn.EmbeddingBag(9, 12, max_norm=0.5).eval()
    store.add("m", layer)
    ids = torch.randint(0, 9, (7, 5))
    wanted = copy.deepcopy(layer).to(used)(ids)
    for _ in range(2):
        got = store.attach(copy.deepcopy(layer).to(used), "m")(ids)
        rtol = 1e-9 if used == torch.float64 else 2e-2
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol)


@MANY
@given(
    mode=st.sampled_from(["sum", "mean", "max"]),
    padding=st.sampled_from([None, 0, -1]),
    last=st.booleans(),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6),
)
def test_embedding_bag_with_offsets(
    check: Check, mode: str, padding: int | None, last: bool, lengths: list[int]
) -> None:
    layer = nn.EmbeddingBag(50, 12, mode=mode, padding_idx=padding, include_last_offset=last)
    ids = torch.randint(0, 50, (sum(lengths),))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    assert check(layer, ids, offsets if last else offsets[:-1]) == set()


@pytest.mark.parametrize("last", [(), (0, 2, 4), (0, 2, -1)])
def test_bags_whose_last_does_not_end_in_the_ids(
    store: pydedup.Store, last: tuple[int, ...]
) -> None:
    module = nn.EmbeddingBag(9, 12, include_last_offset=True).eval()
    store.add("m", module)
    attached = store.attach(module, "m")
    with pytest.raises(ArgumentError, match="last bag"):
        attached(torch.tensor([1, 2, 3]), torch.tensor(last, dtype=torch.int64))


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_of_a_matrix_of_ids(check: Check, mode: str, padding: int | None) -> None:
    layer = nn.EmbeddingBag(9, 12, mode=mode, padding_idx=padding)
    ids = torch.randint(0, 9, (7, 5))
    assert check(layer, ids) == set()
    if mode == "sum":
        assert check(layer, ids, per_sample_weights=torch.randn(7, 5)) == set()
    assert check(nn.EmbeddingBag(9, 12, mode=mode, max_norm=0.5, padding_idx=padding), ids) == set()


@MANY
@given(
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["same", "valid", 0, 2, (1, 2)]),
    how=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_conv2d(
    check: Check,
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: int,
    padding: Any,
    how: str,
) -> None:
    if padding == "same":
        stride = (1, 1)
    layer = nn.Conv2d(
        8, 12, kernel, stride, padding, dilation, groups, bias=groups > 1, padding_mode=how
    )
    assert check(layer, torch.randn(2, 8, 11, 13)) == set()
    assert check(layer, torch.randn(8, 11, 13)) == set()


@pytest.mark.parametrize("how", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", 2])
def test_conv1d(check: Check, padding: Any, how: str) -> None:
    layer = nn.Conv1d(8, 12, 3, padding=padding, dilation=2, groups=2, padding_mode=how)
    assert check(layer, torch.randn(2, 8, 20)) == set()
    assert check(layer, torch.randn(8, 20)) == set()
    assert check(nn.Conv1d(8, 12, 5, stride=3), torch.randn(2, 8, 20)) == set()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LayerNorm(30), (4, 30)),
        (nn.LayerNorm((5, 6), elementwise_affine=False), (4, 5, 6)),
        (nn.BatchNorm1d(30), (4, 30)),
        (nn.BatchNorm2d(8), (2, 8, 5, 6)),
        (nn.BatchNorm2d(8, track_running_stats=False), (2, 8, 5, 6)),
        (nn.GroupNorm(2, 8), (2, 8, 5, 6)),
        (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), (2, 8, 5, 6)),
        (nn.PReLU(8), (2, 8, 5)),
        (nn.RMSNorm(30), (4, 30)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms(check: Check, layer: Any, shape: tuple[int, ...]) -> None:
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    check(layer, torch.randn(shape))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}])
def test_recurrent(check: Check, kind: Any, options: dict[str, bool]) -> None:
    check(kind(12, 9, 2, **options), torch.randn(4, 3, 12))
    for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        assert check(cell(12, 9), torch.randn(4, 12)) == set()
    assert check(nn.RNNCell(12, 9, nonlinearity="relu"), torch.randn(12)) == set()
    if kind is nn.LSTM:
        check(kind(12, 9, 2, proj_size=5, **options), torch.randn(4, 3, 12))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_layers_larger_than_the_budget_lets_in(
    tmp_path: Path, loaded: Callable[[Any], set[str]], kind: str, bias: bool
) -> None:
    options = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}]
    if kind == "LSTM":
        options.append({"proj_size": 30, "bidirectional": True})
    if kind == "RNN":
        options.append({"nonlinearity": "relu"})
    for number, option in enumerate(options):
        layer = getattr(nn, kind)(200, 400 if kind == "RNN" else 160, bias=bias, **option).eval()
        with pydedup.open(tmp_path / f"{number}.db", memory="2600KiB") as store, torch.no_grad():
            store.add("m", layer)
            attached = store.attach(copy.deepcopy(layer), "m@1")
            for x in (torch.randn(5, 3, 200), torch.randn(4, 200)):
                torch.testing.assert_close(attached(x), layer(x), rtol=1e-4, atol=1e-5)
            state = tuple(torch.randn_like(part) for part in _state(layer(torch.randn(5, 3, 200))))
            x = torch.randn(3 if layer.batch_first else 5, 5 if layer.batch_first else 3, 200)
            state = state if len(state) > 1 else state[0]
            if not layer.batch_first:
                got, wanted = attached(x, state), layer(x, state)
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            lengths = (2, 5, 3, 1, 5) if layer.batch_first else (2, 5, 3)
            parts = [torch.randn(n, 200) for n in lengths]
            packed = nn.utils.rnn.pack_sequence(parts, enforce_sorted=False)
            for arguments in ((packed,), (packed, state)):
                got, wanted = attached(*arguments), layer(*arguments)
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            assert loaded(attached) == set()


def _state(result: Any) -> tuple[Any, ...]:
    return result[1] if isinstance(result[1], tuple) else (result[1],)


def test_packed_sequences(check: Check, store: pydedup.Store) -> None:
    lengths = torch.tensor([5, 3, 2])
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 12), lengths)
    layer = nn.LSTM(12, 9).eval()
    with torch.no_grad():
        wanted = layer(packed)[0].data
        store.add("m", layer)
        torch.testing.assert_close(store.attach(layer, "m")(packed)[0].data, wanted)


def test_what_cannot_be_streamed_is_loaded(check: Check) -> None:
    assert check(nn.Conv3d(4, 6, 2), torch.randn(2, 4, 5, 5, 5)) == {"weight"}
    assert check(nn.ConvTranspose2d(4, 6, 3), torch.randn(2, 4, 5, 5)) == {"weight"}
    assert check(nn.Bilinear(5, 6, 7), torch.randn(3, 5), torch.randn(3, 6)) == {"weight"}


@pytest.mark.parametrize("width", [64, 96])  # whole blocks, and parts of them
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 30}])
def test_multi_head_attention(check: Check, width: int, options: dict[str, Any]) -> None:
    layer = nn.MultiheadAttention(width, 4, batch_first=True, **options)
    q, k, v = (torch.randn(3, length, width) for length in (5, 7, 7))
    if "kdim" in options:
        k = torch.randn(3, 7, 30)
    else:
        assert check(layer, q, q, q, need_weights=False) - {"bias_k", "bias_v"} == set()
        check(layer, q, k, k)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    found = check(layer, q, k, v, key_padding_mask=padding, attn_mask=torch.ones(5, 7).tril(2) == 0)
    assert found - {"bias_k", "bias_v"} == set()
    check(layer, q, k, v, average_attn_weights=False)


def test_transformers_of_torch(check: Check) -> None:
    x, y = torch.randn(2, 5, 64), torch.randn(2, 4, 64)
    for options in ({"activation": "gelu"}, {"norm_first": True}):
        layer = nn.TransformerEncoderLayer(64, 4, 100, batch_first=True, **options)
        assert check(layer, x) == set()
    assert check(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), x) == set()
    assert check(nn.Transformer(64, 4, 1, 1, 100, batch_first=True), x, y) == set()
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    assert check(nn.Transformer(64, 4, 1, 1, 100, batch_first=True), x, y, tgt_mask=mask) == set()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_padded_batch_in_the_fast_path_of_torch(store: pydedup.Store) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 100, batch_first=True), 2)
    encoder.eval()
    x, padding = torch.randn(2, 5, 64), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        wanted = encoder(x, src_key_padding_mask=padding)
        store.add("m", encoder)
        got = store.attach(encoder, "m")(x, src_key_padding_mask=padding)
    # The fast path leaves zeros where there is padding, the other one what it computed there.
    torch.testing.assert_close(got[~padding], wanted[~padding], rtol=1e-4, atol=1e-4)


class Custom(nn.Module):
    """Parameters used in ways that no layer of torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(70, 50))
        self.positions = nn.Parameter(torch.randn(1, 20, 50))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.randn(50))
        self.register_buffer("ids", torch.arange(20), persistent=False)

    def forward(self, x: Any) -> Any:
        x = x + self.positions[:, : x.shape[1]] * self.scale + self.offset
        y = x @ self.matrix.t() @ self.matrix
        y = torch.matmul(y, self.matrix.transpose(0, 1))[..., :50]
        y = y + torch.addmm(self.offset, y.reshape(-1, 50), self.matrix[:50]).view_as(y)
        y = y + (self.matrix @ y.reshape(-1, 50).T).T[:, :50].view_as(y)
        y = nn.functional.linear(y, self.matrix[3:53], self.offset)
        y = y + self.matrix[self.ids[: x.shape[1]]] + self.matrix[torch.tensor([-1])]
        return y.to(self.matrix) + self.matrix.detach().to(y.dtype)[5:55].split(25)[1].mean()


def test_a_module_of_ones_own(check: Check) -> None:
    assert check(Custom(), torch.randn(2, 6, 50) / 50, rtol=1e-3) == {"positions", "matrix"}


def test_parametrized_weights(check: Check) -> None:
    check(nn.utils.parametrizations.weight_norm(nn.Linear(20, 30)), torch.randn(4, 20))
    check(nn.utils.parametrizations.orthogonal(nn.Linear(20, 30)), torch.randn(4, 20))


def test_a_model_larger_than_the_budget(tmp_path: Path) -> None:
    net = nn.Sequential(
        *(nn.Sequential(nn.Linear(768, 768), nn.LayerNorm(768), nn.ReLU()) for _ in range(6)),
        nn.Linear(768, 5),
    ).eval()
    x = torch.randn(3, 768)
    with pydedup.open(tmp_path / "small.db", memory="4MiB") as store:
        report = store.add("m", net)
        assert report.logical_bytes > 13 << 20
        with torch.no_grad():
            wanted = net(x)
            got = store.attach(net, "m")(x)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert store.stats().pool["bytes"] <= 4 << 20
        assert store.stats().pool["evictions"] > 0
