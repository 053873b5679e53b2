"""What a graph does not take is read by the model's own forward: images, sound, embeddings, positions in three rows."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import kvmix_compile
from kvmix_compile import KVMixCache
from kvmix_compile.errors import InputError, KVMixError
from kvmix_compile.passes.capture.signature import cache_name
from tests.helpers.agreement import assert_states_agree
from tests.helpers.one_capture import applied
from tests.helpers.toy_llama import RECENT, SINKS, ids, lossless, original, quantized, unquantized
from tests.helpers.toy_multimodal import FAMILIES, IMAGE

GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
# So many tokens behind an image that some of them are packed.
AFTER = 75


@cache
def model_of(name: str) -> Any:
    return FAMILIES[name].toy()


@cache
def small(name: str) -> Any:
    """At 2.3 bits."""
    return applied(model_of(name), budget=2.3, calibration=text_of(1, 64), sinks=SINKS, recent=RECENT)


@cache
def twin_of(name: str) -> Any:
    """With a KVMixCache that quantizes nothing."""
    return applied(model_of(name), plan=unquantized(small(name).kvmix_plan), verify=False)


def text_of(rows: int, tokens: int) -> Tensor:
    """Token ids none of which stands for an image or is special."""
    return torch.randint(3, IMAGE, (rows, tokens), generator=torch.Generator().manual_seed(1))


def embeddings(rows: int, tokens: int, seed: int = 1) -> Tensor:
    """What no token ids stand for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, original().config.hidden_size, generator=generator)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


# Families


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_or_sound_is_read_and_written_about_as_by_the_original(name: str) -> None:
    prompt = FAMILIES[name].prompt(rows=2, after=AFTER)
    expected = model_of(name).generate(**prompt, **GREEDY)
    assert torch.equal(twin_of(name).generate(**prompt, **GREEDY), expected)
    found = small(name).generate(**prompt, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert found.sequences.shape == expected.shape
    assert all(bool(logits.isfinite().all()) for logits in found.logits)
    # A prompt is read in full precision, whatever is stored of it.
    assert torch.equal(found.sequences[:, :-9], expected[:, :-9])


@pytest.mark.parametrize("name", FAMILIES)
def test_text_alone_is_written_on_as_by_the_original(name: str) -> None:
    text = text_of(2, 50)
    assert torch.equal(twin_of(name).generate(text, **GREEDY), model_of(name).generate(text, **GREEDY))


def test_models_that_were_used_for_images_are_used_again() -> None:
    """Some keep how far an image moved the positions of what follows it."""
    model, twin = model_of("qwen2_5_vl"), twin_of("qwen2_5_vl")
    for seed in (1, 2):
        prompt = FAMILIES["qwen2_5_vl"].prompt(rows=1, seed=seed)
        assert torch.equal(twin.generate(**prompt, **GREEDY), model.generate(**prompt, **GREEDY))
    text = text_of(1, 20)
    assert torch.equal(twin.generate(text, **GREEDY), model.generate(text, **GREEDY))


def test_the_original_is_as_it_was() -> None:
    model, family = model_of("qwen2_5_vl"), FAMILIES["qwen2_5_vl"]
    before = dict(vars(model.model))
    twin_of("qwen2_5_vl").generate(**family.prompt(seed=3), **GREEDY)
    assert vars(model.model).keys() == before.keys()
    assert all(vars(model.model)[name] is value for name, value in before.items())


# Embeddings


def test_embeddings_are_read_as_by_the_original() -> None:
    given = embeddings(2, 50)
    assert_close(lossless()(inputs_embeds=given).logits, original()(inputs_embeds=given).logits)
    assert torch.equal(lossless().generate(inputs_embeds=given, **GREEDY),
                       original().generate(inputs_embeds=given, **GREEDY))  # fmt: skip
    labels = ids(2, 50)
    found, expected = (model(inputs_embeds=given, labels=labels) for model in (lossless(), original()))
    assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("padding", [slice(0, 6), slice(40, 50), slice(20, 23)])
def test_padding_between_embeddings_is_not_stored(padding: slice) -> None:
    given, mask = embeddings(2, 50), torch.ones(2, 51, dtype=torch.int64)
    mask[0, padding] = 0
    held: dict[str, Any] = {"cache": KVMixCache(lossless())}, {}
    logits = []
    for model, past in zip((lossless(), original()), held, strict=True):
        first = model(inputs_embeds=given, attention_mask=mask[:, :50], use_cache=True, **past)
        positions = mask.cumsum(1)[:, -1:] - 1
        past = {"past_key_values": first["past_key_values" if "past_key_values" in first else "cache"]}
        second = model(ids(2, 1), attention_mask=mask, position_ids=positions, **past)
        logits.append(torch.cat([first.logits[mask[:, :50].bool()], second.logits[:, 0]]))
    assert_close(*logits)
    assert held[0]["cache"].lengths.tolist() == [51 - (padding.stop - padding.start), 51]


def test_embeddings_are_stored_as_the_tokens_that_they_are_of() -> None:
    """Whichever way a text comes in, and in whatever parts."""
    text = ids(2, 90)
    embedded = original().get_input_embeddings()(text).detach()
    ways: list[list[dict[str, Tensor]]] = [
        [{"input_ids": text}],
        [{"inputs_embeds": embedded}],
        [{"inputs_embeds": embedded[:, :40]}, {"input_ids": text[:, 40:41]}, {"inputs_embeds": embedded[:, 41:]}],
    ]
    caches = []
    for parts in ways:
        past = KVMixCache(lossless())
        logits = torch.cat([lossless()(**part, cache=past).logits for part in parts], dim=1)
        assert_close(logits, original()(text).logits)
        caches.append(past)
    for past in caches[1:]:
        for state, expected, layout in zip(past.states, caches[0].states, past.layouts, strict=True):
            assert_states_agree(state, expected, layout)


def test_what_is_quantized_of_embeddings_is_what_is_quantized_of_tokens() -> None:
    text = ids(1, 120)
    caches = [KVMixCache(quantized()) for _ in range(2)]
    quantized()(text, cache=caches[0])
    quantized()(inputs_embeds=original().get_input_embeddings()(text).detach(), cache=caches[1])
    for found, expected, layout in zip(*(past.states for past in caches), caches[0].layouts, strict=True):
        assert_states_agree(found, expected, layout)
    # The past is read as it is stored, by tokens and by embeddings.
    following = ids(1, 9, seed=4)
    embedded = original().get_input_embeddings()(following).detach()
    assert_close(quantized()(inputs_embeds=embedded, cache=caches[1]).logits,
                 quantized()(following, cache=caches[0]).logits)  # fmt: skip


# Turns


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_an_image_is_read_behind_a_text(name: str) -> None:
    family, model, twin = FAMILIES[name], model_of(name), twin_of(name)
    prompt, text = family.prompt(rows=2), text_of(2, 40)
    mask = torch.ones(2, 40 + prompt["input_ids"].shape[1] + 1, dtype=torch.int64)
    logits = []
    for reader in (twin, model):
        past = reader(text, use_cache=True)
        held = past["cache" if "cache" in past else "past_key_values"]
        image = reader(**prompt | {"attention_mask": mask[:, :-1]}, past_key_values=held)
        step = reader(text[:, :1], attention_mask=mask, past_key_values=held)
        logits.append(torch.cat([image.logits, step.logits], dim=1))
    assert_close(*logits)


def test_positions_behind_an_image_have_to_be_told_where_they_are_not_counted() -> None:
    prompt, twin = FAMILIES["qwen2_5_vl"].prompt(), twin_of("qwen2_5_vl")
    past = KVMixCache(twin)
    twin(**prompt, cache=past)
    before = [tensor.clone() for tensor in past.tensors()]
    with pytest.raises(InputError, match="pass position_ids"):
        twin(text_of(1, 1), cache=past)
    assert all(torch.equal(one, other) for one, other in zip(past.tensors(), before, strict=True))


def test_a_cache_of_an_image_is_saved_and_loaded(tmp_path: Path) -> None:
    prompt, twin = FAMILIES["qwen2_5_vl"].prompt(), small("qwen2_5_vl")
    past = KVMixCache(twin)
    twin(**prompt, cache=past)
    past.save(tmp_path / "cache.safetensors")
    again = KVMixCache.load(tmp_path / "cache.safetensors", twin)
    positions = torch.tensor([[11]])
    following = text_of(1, 1)
    assert torch.equal(twin(following, position_ids=positions, cache=again).logits,
                       twin(following, position_ids=positions, cache=past).logits)  # fmt: skip
    with pytest.raises(InputError, match="pass position_ids"):
        twin(following, cache=KVMixCache.load(tmp_path / "cache.safetensors", twin))


def test_beams_and_several_answers_are_those_of_the_original() -> None:
    prompt = FAMILIES["llava"].prompt(rows=2)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(twin_of("llava").generate(**prompt, **options), model_of("llava").generate(**prompt, **options))


# Refused


class KeepingMore(LlamaForCausalLM):
    """Keeps keys and values of an image apart, as models do that attend to images by cross-attention."""

    def forward(self, input_ids=None, pixel_values=None, cache=None, **kwargs):
        if pixel_values is not None and cache is not None:
            cache.update(pixel_values, pixel_values, 7)
        return super().forward(input_ids, **{cache_name(LlamaForCausalLM.forward): cache}, **kwargs)


class PuttingInFront(LlamaForCausalLM):
    """Puts an image's embeddings in front of the text."""

    def forward(self, input_ids=None, pixel_values=None, cache=None, **kwargs):
        kwargs[cache_name(LlamaForCausalLM.forward)] = cache
        if pixel_values is None:
            return super().forward(input_ids, **kwargs)
        embedded = torch.cat([pixel_values, self.get_input_embeddings()(input_ids)], dim=1)
        return super().forward(inputs_embeds=embedded, **kwargs)


@pytest.mark.parametrize(
    "kind, given, message",
    [
        (KeepingMore, torch.zeros(1, 2, 5, 32), "keeps more than keys and values"),
        (PuttingInFront, torch.zeros(1, 5, 128), "makes 14 tokens of the 9"),
    ],
)
def test_what_a_cache_has_no_place_for_is_refused(kind: Any, given: Tensor, message: str) -> None:
    model = kind(original().config).eval()
    twin = kvmix_compile.apply(model, plan=lossless().kvmix_plan, verify=False)
    past = KVMixCache(twin)
    with pytest.raises(InputError, match=message):
        twin(ids(1, 9), pixel_values=given, cache=past)
    assert not past.is_initialized and past.get_seq_length() == 0
    assert_close(twin(ids(1, 9), cache=past).logits, model(ids(1, 9)).logits)
    # Without a cache there is nothing to keep.
    found, expected = (reader(ids(1, 9), pixel_values=given, use_cache=False).logits for reader in (twin, model))
    assert_close(found, expected)


def test_a_failed_call_leaves_the_cache_as_it_was() -> None:
    twin, prompt = twin_of("llava"), FAMILIES["llava"].prompt()
    wrong = prompt | {"input_ids": text_of(1, 28)}
    empty, filled = KVMixCache(twin), KVMixCache(twin)
    twin(text_of(1, 50), cache=filled)
    before = [tensor.clone() for tensor in filled.tensors()]
    for past in (empty, filled):
        with pytest.raises(ValueError, match="do not match"):  # the original's own
            twin(**{**wrong, "attention_mask": None}, cache=past)
    assert not empty.is_initialized and empty.get_seq_length() == 0
    assert filled.get_seq_length() == 50
    assert all(torch.equal(one, other) for one, other in zip(filled.tensors(), before, strict=True))


def test_exact_chunks_and_images_are_not_for_one_call() -> None:
    exact = applied(original(), plan=quantized().kvmix_plan, exact_chunks=True, verify=False)
    with pytest.raises(InputError, match="exact_chunks.*one go"):
        exact(inputs_embeds=embeddings(1, 9))


def test_embeddings_beyond_the_positions_are_refused() -> None:
    with pytest.raises(InputError, match="513 tokens are more than the 512 positions"):
        lossless()(inputs_embeds=embeddings(1, 513))


def test_a_mask_of_four_dimensions_is_refused() -> None:
    with pytest.raises(KVMixError, match=r"must be \[batch, tokens\]"):
        lossless()(inputs_embeds=embeddings(1, 9), attention_mask=torch.zeros(1, 1, 9, 9))
