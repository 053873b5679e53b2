"""Assisted decoding: whoever proposes tokens, and however many: all that is wrong is taken back."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import kvmix_compile
from kvmix_compile import KVMixCache, Plan
from kvmix_compile.errors import CacheError, InputError
from kvmix_compile.models_zoo.characters import character_tokenizer
from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.one_capture import applied, zoo
from tests.helpers.toy_llama import RECENT, SINKS, ids, lossless, original, quantized, unquantized

# The prompt repeats itself, so that a lookup finds much to propose.
PROMPT = ids(1, 23).repeat(1, 5)
GREEDY: dict[str, Any] = {"max_new_tokens": 90, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


@cache
def written() -> Tensor:
    """What the original writes, greedily."""
    return original().generate(PROMPT, **GREEDY)


def proposing(model: PreTrainedModel, tokens: int, schedule: str = "constant") -> PreTrainedModel:
    """The model with so many tokens to propose in a step, from all of which it has to be dissuaded."""
    model.generation_config.num_assistant_tokens = tokens
    model.generation_config.num_assistant_tokens_schedule = schedule
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def erring(tokens: int, name: str = "llama", **settings: Any) -> PreTrainedModel:
    """A model that proposes so many tokens, of which several are often right."""
    model, generator = tiny(name, **settings), torch.Generator().manual_seed(0)
    with torch.no_grad():
        head = model.lm_head.weight
        model.lm_head.weight = torch.nn.Parameter(head + 0.004 * torch.randn(head.shape, generator=generator))
    return proposing(model, tokens)


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """At 2.3 bits."""
    return applied(model, plan=plan_for(model.config.model_type), verify=False)


def exact_twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """At 16 bits."""
    return applied(model, plan=unquantized(plan_for(model.config.model_type)), verify=False)


@cache
def with_windows(name: str) -> PreTrainedModel:
    return tiny(name, sliding_window=60)


@cache
def plan_for(name: str) -> Plan:
    """At 2.3 bits, of the tiny model of this architecture; with windows, where it has any."""
    model = zoo(name) if name == "llama" else with_windows(name)
    options: dict[str, Any] = {"sinks": SINKS, "recent": RECENT, "verify": False}
    return applied(model, budget=2.3, calibration=ids(2, 128), **options).kvmix_plan


def with_settings(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """A twin at 16 bits whose own configuration says so."""
    changed = exact_twin_of(model)
    changed.generation_config = GenerationConfig(**settings)
    return changed


WAYS: dict[str, Callable[[], Tensor]] = {
    "a lookup": lambda: lossless().generate(PROMPT, prompt_lookup_num_tokens=10, **GREEDY),
    "a lookup of 100": lambda: lossless().generate(PROMPT, prompt_lookup_num_tokens=100, **GREEDY),
    "in a configuration": lambda: lossless().generate(PROMPT, GenerationConfig(prompt_lookup_num_tokens=90, **GREEDY)),
    "in the model's own configuration": lambda: with_settings(original(), prompt_lookup_num_tokens=90).generate(
        PROMPT, **GREEDY
    ),
    "an assistant": lambda: lossless().generate(PROMPT, assistant_model=erring(20), **GREEDY),
    "an assistant of 80": lambda: lossless().generate(PROMPT, assistant_model=erring(80), **GREEDY),
    "an assistant of ever more": lambda: lossless().generate(
        PROMPT, assistant_model=proposing(tiny("llama"), 30, "heuristic"), **GREEDY
    ),
    "an assistant and a configuration": lambda: lossless().generate(
        PROMPT, GenerationConfig(**GREEDY), assistant_model=erring(80)
    ),
    "a compiled assistant of 80": lambda: lossless().generate(
        PROMPT, assistant_model=exact_twin_of(erring(80)), **GREEDY
    ),
    "a compiled assistant of ever more": lambda: lossless().generate(
        PROMPT, assistant_model=exact_twin_of(proposing(tiny("llama"), 30, "heuristic")), **GREEDY
    ),
    "a compiled assistant of the original": lambda: original().generate(
        PROMPT, assistant_model=exact_twin_of(erring(80)), **GREEDY
    ),
    "a twin of the original as its assistant": lambda: original().generate(
        PROMPT, assistant_model=exact_twin_of(proposing(tiny("llama"), 70, "heuristic")), **GREEDY
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_propose_writes_what_greedy_writes_at_16_bits(way: str) -> None:
    assert torch.equal(WAYS[way](), written())


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_windows_take_back_too(name: str) -> None:
    model = tiny(name, sliding_window=60)
    small = exact_twin_of(model)
    expected = model.generate(PROMPT, **GREEDY)
    assistant = erring(80, name, sliding_window=60)
    for how in ({"prompt_lookup_num_tokens": 100}, {"assistant_model": assistant}):
        # transformers before 5.24 goes on beyond the end with what it looks up.
        assert torch.equal(small.generate(PROMPT, **how, **GREEDY)[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("rollback", [0, 5])
def test_a_cache_that_was_given_learns_to_take_back(rollback: int) -> None:
    past = KVMixCache(lossless(), rollback=rollback)
    text = lossless().generate(PROMPT, cache=past, prompt_lookup_num_tokens=80, **GREEDY)
    assert torch.equal(text, written())
    assert past.rollback > 64 and not past.records_past
    longer = torch.cat((text, ids(1, 20)), dim=1)  # and goes on without
    options = {**GREEDY, "max_new_tokens": 10}
    assert torch.equal(lossless().generate(longer, cache=past, **options), original().generate(longer, **options))


def test_a_cache_that_holds_a_text_is_refused() -> None:
    """transformers would read the whole prompt into it once more."""
    past = KVMixCache(lossless())
    lossless()(PROMPT[:, :80], cache=past)
    with pytest.raises(InputError, match="assisted decoding reads the whole prompt.*holds 80 tokens"):
        lossless().generate(PROMPT, cache=past, prompt_lookup_num_tokens=10, **GREEDY)
    assert past.get_seq_length() == 80


def test_a_cache_takes_no_more_room_for_plain_decoding() -> None:
    past = KVMixCache(lossless())
    lossless().generate(PROMPT, cache=past, **GREEDY)
    assert past.rollback == 0


@cache
def small(name: str) -> PreTrainedModel:
    return twin_of(tiny(name, **({} if name == "llama" else {"sliding_window": 60})))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("begun", [0, 3, 37, 68, 131, 200])
def test_rollback_that_grows_is_as_good_as_rollback_from_the_beginning(name: str, begun: int) -> None:
    """Quantized, two rows of which one is padded, and a block or a window further on each time."""
    model, text, wrong = small(name), ids(2, 420), ids(2, 120, seed=9)
    mask = torch.ones(2, 420, dtype=torch.int64)
    mask[1, : min(begun, 20)] = 0
    grown, made = KVMixCache(model), KVMixCache(model, rollback=160)
    for past in (grown, made):
        if begun:
            model(text[:, :begun], cache=past, attention_mask=mask[:, :begun])
    grown.activate_past_recording()
    at = begun
    for proposed, right in ((10, 4), (40, 40), (90, 1), (120, 33), (5, 0), (31, 31)):
        chunk = torch.cat((text[:, at : at + right + 1], wrong[:, : proposed - right]), dim=1)
        after = at + chunk.shape[1]
        logits = [model(chunk, cache=past, attention_mask=mask[:, :after]).logits for past in (grown, made)]
        assert torch.equal(*logits)
        for past in (grown, made):
            past.crop(right - proposed)
        at += right + 1
        assert grown.get_seq_length() == made.get_seq_length() == at
    assert 120 <= grown.rollback <= 192


def test_more_than_was_recorded_is_not_taken_back() -> None:
    past = KVMixCache(quantized())
    quantized()(ids(1, 200), cache=past)
    past.activate_past_recording()
    quantized()(ids(1, 90, seed=2), cache=past)
    with pytest.raises(CacheError, match="cannot take back 150 tokens"):
        past.crop(-150)
    past.crop(-90)
    assert past.get_seq_length() == 200


def test_tokens_in_another_tokenizer_are_proposed_too() -> None:
    """Proposals have another length there, and what the assistant takes back has any."""
    tokenizers = {"tokenizer": character_tokenizer(), "assistant_tokenizer": character_tokenizer()}
    prompt, options = ids(1, 40), {**GREEDY, "max_new_tokens": 20}
    model = erring(10, vocab_size=130)
    assistant = kvmix_compile.apply(
        model, budget=2.3, calibration=ids(2, 128), sinks=SINKS, recent=RECENT, verify=False
    )
    text = lossless().generate(prompt, assistant_model=assistant, **tokenizers, **options)
    assert torch.equal(text, original().generate(prompt, **options))


def test_an_assistants_cache_that_cannot_take_back_is_read_again() -> None:
    past = KVMixCache(quantized())
    past.is_read_again = True
    quantized()(ids(1, 200), cache=past)
    past.crop(-100)
    assert past.get_seq_length() == 0


@pytest.mark.parametrize("way", ["lookup", "assistant"])
def test_quantized_models_take_proposals_of_any_length(way: str) -> None:
    how: dict[str, Any] = {"prompt_lookup_num_tokens": 100} if way == "lookup" else {"assistant_model": erring(80)}
    text = quantized().generate(PROMPT, **how, **GREEDY)
    assert text.shape[1] == PROMPT.shape[1] + GREEDY["max_new_tokens"]


def test_with_exact_chunks_quantized_models_write_what_greedy_writes() -> None:
    model = applied(original(), plan=quantized().kvmix_plan, exact_chunks=True, verify=False)
    greedy = model.generate(PROMPT, **GREEDY)
    for how in ({"prompt_lookup_num_tokens": 40}, {"assistant_model": erring(40)}):
        assert torch.equal(model.generate(PROMPT, **how, **GREEDY), greedy)


READING_STATES: dict[str, dict[str, Any]] = {
    "dola_layers": {"dola_layers": "low"},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "use_mtp": {"use_mtp": True},
}


@pytest.mark.parametrize("setting", READING_STATES)
@pytest.mark.parametrize("configured", [False, True])
def test_decoding_that_reads_hidden_states_is_refused_by_name(setting: str, configured: bool) -> None:
    settings = READING_STATES[setting]
    how = {"generation_config": GenerationConfig(**settings)} if configured else settings
    with pytest.raises(InputError, match=f"{setting}.*hidden states.*original model"):
        lossless().generate(PROMPT, **how)
