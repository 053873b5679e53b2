"""transformers' generate on the compiled model: every way to decode gives, at 16 bits, what the original gives."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from kvmix_compile import KVMixCache
from kvmix_compile.errors import InputError
from kvmix_compile.kernels.format.state import ENDLESS, SiteState
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.signature import cache_in
from tests.helpers.toy_llama import ids, lossless, original, quantized

grow = SiteState.grow

# The last token of the vocabulary is the end: a random model rarely says it, so that texts have their full length.
OPTIONS: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": 127, "pad_token_id": 0}
GREEDY: dict[str, Any] = {**OPTIONS, "do_sample": False}


def both(prompt: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """What the original and the lossless twin generate from the same seed."""
    texts = []
    for model in (original(), lossless()):
        torch.manual_seed(7)
        texts.append(model.generate(prompt, **{**OPTIONS, **options}))
    return texts[0], texts[1]


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam search": {"do_sample": False, "num_beams": 3},
    "several beams returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "guidance": {"do_sample": False, "guidance_scale": 1.5},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 16},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4},
    "without a cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_decoding_is_the_originals_at_16_bits(way: str) -> None:
    rows = 1 if way == "prompt lookup" else 2
    expected, actual = both(ids(rows, 70), **WAYS[way])
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_decoding_runs_quantized(way: str) -> None:
    rows = 1 if way == "prompt lookup" else 2
    text = quantized().generate(ids(rows, 70), **{**OPTIONS, **WAYS[way]})
    assert text.shape[0] == rows * WAYS[way].get("num_return_sequences", 1) and 70 < text.shape[1] <= 90


def test_assisted_generation_is_the_originals() -> None:
    assistant = tiny("llama", num_hidden_layers=1)
    prompt = ids(1, 70)
    expected = original().generate(prompt, **GREEDY)
    assert torch.equal(lossless().generate(prompt, assistant_model=assistant, **GREEDY), expected)


def test_a_compiled_model_may_be_the_assistant() -> None:
    prompt = ids(1, 70)
    expected = original().generate(prompt, **GREEDY)
    assert torch.equal(original().generate(prompt, assistant_model=quantized(), **GREEDY), expected)


@pytest.mark.parametrize("way", ["greedy", "beam search", "sampling"])
def test_left_padded_batches(way: str) -> None:
    prompt, mask = ids(3, 60), torch.ones(3, 60, dtype=torch.int64)
    for row, padding in enumerate((0, 25, 59)):
        prompt[row, :padding], mask[row, :padding] = 0, 0
    expected, actual = both(prompt, attention_mask=mask, **WAYS[way])
    assert torch.equal(actual, expected)


def test_a_padded_row_generates_what_it_generates_alone() -> None:
    prompt, mask = ids(2, 60), torch.ones(2, 60, dtype=torch.int64)
    prompt[1, :25], mask[1, :25] = 0, 0
    batch = lossless().generate(prompt, attention_mask=mask, **GREEDY)
    assert torch.equal(batch[1, 25:], lossless().generate(prompt[1:, 25:], **GREEDY)[0])


def test_generating_twice_gives_the_same() -> None:
    prompt = ids(1, 70)
    assert torch.equal(quantized().generate(prompt, **GREEDY), quantized().generate(prompt, **GREEDY))


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_tokens_are_streamed() -> None:
    listener, prompt = Listener(), ids(1, 40)
    text = quantized().generate(prompt, streamer=listener, **GREEDY)
    assert listener.ended and listener.tokens == text[0].tolist()


class EveryRowSaid(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return (input_ids == self.token).any(dim=1)


@pytest.mark.parametrize("model", [lossless, quantized])
def test_criteria_stop_it(model: Callable[[], Any]) -> None:
    prompt = ids(1, 40)
    text = model().generate(prompt, **GREEDY)
    told = next(index for index in range(42, 60) if text[0, index] not in text[0, :index])
    past = KVMixCache(model())
    criteria = StoppingCriteriaList([EveryRowSaid(int(text[0, told]))])
    stopped = model().generate(prompt, past_key_values=past, stopping_criteria=criteria, **GREEDY)
    assert torch.equal(stopped, text[:, : told + 1]) and past.get_seq_length() == told


def test_a_long_generation_grows_its_cache_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing copies, so what is large grows by an eighth at least, or by a sixteenth: no token is copied often."""
    growths = []
    monkeypatch.setattr(SiteState, "grow", lambda state, room: (growths.append(room), grow(state, room)))
    past = KVMixCache(quantized())
    text = quantized().generate(
        ids(1, 10), past_key_values=past, **{**GREEDY, "max_new_tokens": 480, "eos_token_id": -1}
    )
    assert text.shape == (1, 490) and past.states[0].blocks >= 14
    rooms = sorted(set(growths))
    assert len(growths) == len(rooms) * len(past.states)
    blocks = sorted({room.blocks for room in rooms})
    assert len(rooms) <= len(blocks) + 32
    assert all(after <= before + max(1, before // 4) for before, after in pairwise(blocks))
    # On to a hundred thousand tokens, which need 3124 blocks.
    layout = past.layouts[0]
    blocks = sorted({layout.capacity_blocks(tokens) for tokens in range(0, 100_000, 16)})
    assert len(blocks) < 90 and blocks[-1] >= 3124
    # A window kept whole, in which each token is copied 24 times at most.
    layout = replace(layout, shape=replace(layout.shape, window=100_000), sinks=0, recent=ENDLESS)
    slots = {layout.room(tokens).slots for tokens in range(100_000)}
    assert max(slots) == layout.recent_slots and sum(slots) <= 24 * max(slots)


@pytest.mark.parametrize("proposed", [5, 20])
def test_assisted_generation_takes_back_across_blocks(proposed: int) -> None:
    """A short memory, so that what is taken back often lies before the last block that was packed."""
    assistant = tiny("llama", num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = proposed
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    prompt, options = ids(1, 30), {**GREEDY, "max_new_tokens": 120, "eos_token_id": -1}
    expected = original().generate(prompt, **options)
    assert torch.equal(lossless().generate(prompt, assistant_model=assistant, **options), expected)


def test_a_conversation_goes_on_in_the_same_cache() -> None:
    model, past = lossless(), KVMixCache(lossless())
    first = model.generate(ids(1, 50), past_key_values=past, **GREEDY)
    second_prompt = torch.cat((first, ids(1, 30, seed=2)), dim=1)
    held = past.get_seq_length()
    second = model.generate(second_prompt, past_key_values=past, **GREEDY)
    assert held == 69 and past.get_seq_length() == 119
    assert torch.equal(second, original().generate(second_prompt, **GREEDY))


def test_a_padded_conversation_goes_on_too() -> None:
    prompt, mask = ids(2, 40), torch.ones(2, 40, dtype=torch.int64)
    prompt[1, :15], mask[1, :15] = 0, 0
    past = KVMixCache(lossless())
    first = lossless().generate(prompt, attention_mask=mask, past_key_values=past, **GREEDY)
    longer = torch.cat((first, ids(2, 10, seed=2)), dim=1)
    longer_mask = torch.cat((mask, torch.ones(2, 30, dtype=torch.int64)), dim=1)
    second = lossless().generate(longer, attention_mask=longer_mask, past_key_values=past, **GREEDY)
    assert torch.equal(second, original().generate(longer, attention_mask=longer_mask, **GREEDY))


def test_what_was_generated_comes_with_its_cache() -> None:
    output = quantized().generate(ids(1, 40), return_dict_in_generate=True, output_logits=True, **GREEDY)
    assert isinstance(cache_in(output), KVMixCache)
    assert cache_in(output).get_seq_length() == output.sequences.shape[1] - 1
    assert len(output.logits) == 20


def test_the_configuration_may_be_an_object() -> None:
    config = GenerationConfig(**GREEDY)
    prompt = ids(1, 40)
    assert torch.equal(quantized().generate(prompt, config), quantized().generate(prompt, **GREEDY))
    assert torch.equal(quantized().generate(prompt, generation_config=config), quantized().generate(prompt, config))


def test_the_end_token_ends() -> None:
    prompt = ids(1, 40)
    text = quantized().generate(prompt, **GREEDY)
    third = int(text[0, 42])
    shortened = quantized().generate(prompt, **{**GREEDY, "eos_token_id": third})
    assert shortened.shape[1] <= 43 and shortened[0, -1] == third


REFUSED: dict[str, Callable[[], Any]] = {
    "a cache of another kind": lambda: quantized().generate(ids(1, 9), cache_implementation="static", **GREEDY),
    "a cache of another kind, in a configuration": lambda: quantized().generate(
        ids(1, 9), GenerationConfig(cache_implementation="quantized", **GREEDY)
    ),
    "attention weights": lambda: quantized().generate(
        ids(1, 9), return_dict_in_generate=True, output_attentions=True, **GREEDY
    ),
    "more tokens than positions": lambda: quantized().generate(ids(1, 510), **GREEDY),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_generated_with_is_an_error(what: str) -> None:
    with pytest.raises(InputError):
        REFUSED[what]()
