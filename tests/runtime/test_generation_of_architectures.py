"""transformers' own way of testing generation, on several architectures: in each mode the twin at 16 bits, most of
whose prompt lies in packed blocks, gives exactly what the original gives.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvmix_compile import KVMixCache
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.signature import cache_in
from tests.helpers.cache_argument import CACHE_ARGUMENT
from tests.helpers.one_capture import applied, zoo
from tests.helpers.toy_llama import RECENT, SINKS, ids

# Rotary, learned and ALiBi positions; separate and fused projections; sliding windows, a soft cap, experts.
ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "opt", "gpt_neox", "falcon_alibi", "mixtral")
PROMPT = 90  # tokens, of which few are sinks or recent ones
LENGTH: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "beams": {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "penalties": {"do_sample": False, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 32},
}


@cache
def pair(name: str) -> tuple[PreTrainedModel, Any]:
    """A model and its twin at 16 bits."""
    model = zoo(name)
    return model, applied(model, budget=16, calibration=ids(1, 64), sinks=SINKS, recent=RECENT)


def generated(name: str, prompt: Tensor, **options: Any) -> list[Any]:
    """What the original and its twin return for the same prompt and seed."""
    found = []
    for model in pair(name):
        torch.manual_seed(3)
        found.append(model.generate(prompt, **LENGTH, **options))
    return found


@cache
def similar(name: str) -> PreTrainedModel:
    """A model that often, not always, writes what the original writes."""
    model = tiny(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_mode_is_the_originals(name: str, mode: str) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, **MODES[mode]}
    expected, actual = generated(name, ids(2, PROMPT), **options)
    assert torch.equal(actual.sequences, expected.sequences)
    assert type(actual) is type(expected) and actual.keys() == expected.keys()
    for one, other in ((actual.scores, expected.scores), (actual.logits, expected.logits)):
        assert len(one) == len(other)
        torch.testing.assert_close(torch.stack(one), torch.stack(other), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_left_padding_is_the_originals(name: str) -> None:
    prompt, mask = ids(2, PROMPT), torch.ones(2, PROMPT, dtype=torch.int64)
    prompt[1, :21], mask[1, :21] = 0, 0
    expected, actual = generated(name, prompt, attention_mask=mask, do_sample=False)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("drafts", ["assistant", "prompt lookup"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_drafts_are_the_originals(name: str, drafts: str) -> None:
    """Whatever is proposed, the text is the original's."""
    draft = {"assistant_model": similar(name)} if drafts == "assistant" else {"prompt_lookup_num_tokens": 3}
    prompt = ids(1, PROMPT // 3).repeat(1, 3)
    expected, actual = generated(name, prompt, do_sample=False, **draft)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cache_is_continued_as_the_originals(name: str) -> None:
    """A conversation: the first answer and another question are given along with the cache of both."""
    texts = []
    for model, past in zip(pair(name), (None, KVMixCache(pair(name)[1])), strict=True):
        held = DynamicCache(config=model.config) if past is None else past
        first = model.generate(
            ids(2, PROMPT), do_sample=False, return_dict_in_generate=True, **{CACHE_ARGUMENT: held}, **LENGTH
        )
        longer = torch.cat((first.sequences, ids(2, 9, seed=5)), dim=1)
        texts.append(model.generate(longer, do_sample=False, **{CACHE_ARGUMENT: cache_in(first)}, **LENGTH))
    assert torch.equal(texts[1], texts[0])
