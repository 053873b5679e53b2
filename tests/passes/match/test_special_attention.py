"""Models whose attention is more than causal: recognised by what it does, verified, and generating what they did."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvmix_compile
from kvmix_compile.errors import InputError
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.models_zoo.tiny import TINY_SPECIAL, WINDOW, tiny
from tests.helpers.one_capture import applied, zoo
from tests.helpers.toy_llama import unquantized

GREEDY: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": 127, "pad_token_id": 0}
# How the report describes the attention of each layer.
ATTENTION: dict[str, list[str]] = {
    "llama4": [f"chunked {WINDOW}"] * 3 + ["causal"],
    "gpt_oss": [f"sliding {WINDOW}, sink logits", "causal, sink logits"],
    "bloom": ["causal, ALiBi"] * 2,
    "mpt": ["causal, ALiBi"] * 2,
    "falcon_alibi": ["causal, ALiBi"] * 2,
}


def ids(rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@cache
def original(name: str) -> PreTrainedModel:
    """llama4-chunks is Llama 4 without the positions that it counts itself, from the beginning of a batch."""
    return tiny("llama4", attn_temperature_tuning=False) if name == "llama4-chunks" else zoo(name)


@cache
def quantized(name: str) -> PreTrainedModel:
    return applied(original(name), budget=2.3, calibration=ids(2, 150), sinks=4, recent=32)


@cache
def lossless(name: str) -> PreTrainedModel:
    return applied(original(name), plan=unquantized(quantized(name).kvmix_plan), verify=False)


@pytest.mark.parametrize("name", TINY_SPECIAL)
def test_it_is_recognised(name: str) -> None:
    report = quantized(name).kvmix_report
    assert [site.attention for site in report.sites] == ATTENTION[name]
    assert all(attention in str(report) for attention in ATTENTION[name])


@pytest.mark.parametrize("name", TINY_SPECIAL)
def test_at_16_bits_the_text_is_the_originals(name: str) -> None:
    prompt = ids(2, 150)
    assert torch.equal(lossless(name).generate(prompt, **GREEDY), original(name).generate(prompt, **GREEDY))


def padded() -> tuple[Tensor, Tensor]:
    prompt, mask = ids(2, 150), torch.ones(2, 150, dtype=torch.int64)
    prompt[1, :37], mask[1, :37] = 0, 0
    return prompt, mask


def test_padding_is_refused_where_a_model_counts_positions_besides_those_given() -> None:
    prompt, mask = padded()
    with pytest.raises(InputError, match="counts its positions itself"):
        lossless("llama4").generate(prompt, attention_mask=mask, **GREEDY)


@pytest.mark.parametrize("name", [name for name in TINY_SPECIAL if name != "llama4"] + ["llama4-chunks"])
def test_so_it_is_where_padding_leads_a_row(name: str) -> None:
    prompt, mask = padded()
    expected = original(name).generate(prompt, attention_mask=mask, **GREEDY)
    assert torch.equal(lossless(name).generate(prompt, attention_mask=mask, **GREEDY), expected)


@pytest.mark.parametrize("name", TINY_SPECIAL)
def test_it_generates_from_a_quantized_cache(name: str) -> None:
    assert quantized(name).kvmix_plan.code_bits <= 2.3
    logits = quantized(name)(ids(2, 150)).logits
    assert logits.isfinite().all()
    assert quantized(name).generate(ids(2, 150), **GREEDY).shape[1] > 150


@pytest.mark.parametrize("name", TINY_SPECIAL)
def test_a_quantized_cache_stays_close(name: str) -> None:
    """In 8 bits, read token by token, logits are nearly the original's."""
    plan = lossless(name).kvmix_plan
    sites = tuple(replace(site, key=Precision(8, 32), value=Precision(8, 32)) for site in plan.sites)
    model = applied(original(name), plan=replace(plan, sites=sites), verify=False)
    text = ids(1, 200)
    with torch.no_grad():
        expected = original(name)(text).logits
    past = kvmix_compile.KVMixCache(model)
    parts = [model(part, past_key_values=past).logits for part in text.split([150] + [1] * 50, dim=1)]
    error = (torch.cat(parts, dim=1) - expected).square().mean().sqrt() / expected.std()
    assert error < 0.05
