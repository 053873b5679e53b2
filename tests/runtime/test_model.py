"""The compiled model: a drop-in for the original, whatever its architecture."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

import kvmix_compile
from kvmix_compile import KVMixCache
from kvmix_compile.errors import InputError
from kvmix_compile.models_zoo import plain
from kvmix_compile.models_zoo.tiny import TINY, tiny
from kvmix_compile.passes.capture.signature import CACHE_NAMES, cache_in
from tests.helpers.cache_argument import CACHE_ARGUMENT
from tests.helpers.one_capture import applied, zoo
from tests.helpers.toy_llama import RECENT, SINKS, ids, unquantized

PLAIN = ("hand_written", "fused_arange")
NAMES = (*TINY, *PLAIN)
PADDABLE = tuple(name for name in NAMES if name != "fused_arange")


@dataclass(frozen=True)
class Compiled:
    """A model, its twin at 2.3 bits, and its twin that quantizes nothing."""

    original: nn.Module
    quantized: nn.Module
    lossless: nn.Module


@cache
def compiled(name: str) -> Compiled:
    original = zoo(name)
    quantized = applied(original, budget=2.3, calibration=ids(2, 128), sinks=SINKS, recent=RECENT)
    lossless = applied(original, plan=unquantized(quantized.kvmix_plan), verify=False)
    return Compiled(original, quantized, lossless)


def logits_of(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def original_logits(name: str, text: Tensor, **options: object) -> Tensor:
    return logits_of(compiled(name).original(text, **options))


def in_chunks(model: nn.Module, text: Tensor, chunks: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """The logits of a text that was given in chunks, through one cache; with a mask, tokens alone are counted."""
    past, seen, logits = KVMixCache(model), 0, []
    for chunk in chunks:
        part = text[:, seen : seen + chunk]
        seen += chunk
        options = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, seen - chunk : seen]
            options = {"attention_mask": mask[:, :seen], "position_ids": positions}
        logits.append(model(part, past_key_values=past, **options).logits)
    assert past.get_seq_length() == text.shape[1]
    return torch.cat(logits, dim=1)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# Every architecture


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_prompts_logits_are_the_originals_at_any_precision(name: str) -> None:
    text = ids(2, 150)
    assert_close(logits_of(compiled(name).quantized(text)), original_logits(name, text))


@pytest.mark.parametrize("name", NAMES)
def test_at_16_bits_any_chunks_give_the_originals_logits(name: str) -> None:
    text = ids(2, 130)
    actual = in_chunks(compiled(name).lossless, text, (37, 1, 1, 64, 2, 25))
    assert_close(actual, original_logits(name, text))


@pytest.mark.parametrize("name", NAMES)
def test_quantized_generation_runs_and_its_cache_is_small(name: str) -> None:
    model, prompt = compiled(name).quantized, ids(2, 150)
    plan = model.kvmix_plan
    # A model whose windows are all shorter than what is kept of recent tokens has nothing to quantize.
    assert plan.code_bits <= 2.3 or (name == "mistral" and not plan.quantized_sites)
    past = KVMixCache(model)
    text = model.generate(prompt, max_new_tokens=8, do_sample=False, past_key_values=past, eos_token_id=-1)
    assert text.shape == (2, 158) and torch.equal(text[:, :150], prompt)
    # The last token was generated and not yet read.
    assert past.get_seq_length() == 157
    assert past.nbytes == plan.cache_bytes(157, 2, torch.float32)
    whole = unquantized(plan).with_windows([0] * len(plan.sites))
    assert past.nbytes < 0.6 * whole.cache_bytes(157, 2, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_at_16_bits_greedy_tokens_are_the_originals(name: str) -> None:
    prompt, tokens = ids(1, 50), 30
    generated = compiled(name).lossless.generate(prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
    expected = prompt
    for _ in range(tokens):
        following = original_logits(name, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, following), dim=1)
    assert generated.tolist() == expected.tolist()


@pytest.mark.parametrize("name", PADDABLE)
def test_a_padded_row_is_that_row_alone(name: str) -> None:
    lengths, longest = (40, 70, 1), 70
    rows = [ids(1, length, seed=length) for length in lengths]
    padded = torch.cat([torch.cat((torch.zeros(1, longest - row.shape[1], dtype=torch.int64), row), 1) for row in rows])
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    following = ids(3, 50, seed=9)
    text, mask = torch.cat((padded, following), 1), torch.cat((mask, torch.ones(3, 50, dtype=torch.bool)), 1).long()
    logits = in_chunks(compiled(name).lossless, text, (70, 1, 49), mask)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = original_logits(name, torch.cat((row, following[index : index + 1]), 1))
        assert_close(logits[index : index + 1, longest - length :], alone)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_found_is_reported(name: str) -> None:
    report = compiled(name).quantized.kvmix_report
    assert len(report.sites) == 2 and report.refused == () and report.problem is None
    assert report.verified is not None and report.verified < 1e-4
    assert report.calibration is not None and "token ids given" in report.calibration
    assert {"capture", "verify", "measure", "rewrite"} <= set(report.seconds)
    assert report.sites[0].layer in str(report)


# Any chunks at all


@settings(max_examples=12)
@given(
    chunks=st.lists(st.integers(min_value=1, max_value=70), min_size=1, max_size=6),
    name=st.sampled_from(["llama", "gemma2"]),
)
def test_any_chunking_is_lossless_at_16_bits(chunks: list[int], name: str) -> None:
    text = ids(1, sum(chunks), seed=3)
    assert_close(in_chunks(compiled(name).lossless, text, chunks), original_logits(name, text))


def test_quantization_is_really_on() -> None:
    text = ids(1, 200)
    difference = in_chunks(compiled("llama").quantized, text, (150, 50)) - original_logits("llama", text)
    assert difference[:, :150].abs().max() < 1e-3
    assert difference[:, 150:].abs().max() > 1e-2


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model = compiled("llama").quantized
    mask = torch.ones(2, 110, dtype=torch.int64)
    mask[0, :20] = 0
    bytes_of_row = []
    for seed in (5, 6):
        past = KVMixCache(model)
        text = torch.cat((ids(1, 110), ids(1, 110, seed=seed)))
        model(text[:, :100], attention_mask=mask[:, :100], past_key_values=past)
        model(text[:, 100:], attention_mask=mask, past_key_values=past)
        bytes_of_row.append([tensor[0].clone() for tensor in past.tensors()])
    assert all(torch.equal(first, second) for first, second in zip(*bytes_of_row, strict=True))


# The shape of a model


def test_it_is_of_the_originals_class_and_says_so() -> None:
    pair = compiled("llama")
    assert isinstance(pair.quantized, LlamaForCausalLM) and isinstance(pair.quantized, PreTrainedModel)
    assert type(pair.quantized).__name__ == "LlamaForCausalLM"
    assert pair.quantized.config.to_dict() == pair.original.config.to_dict()
    assert pair.quantized.device == pair.original.device and pair.quantized.dtype == torch.float32
    assert pair.quantized.can_generate() and not pair.quantized.training


@pytest.mark.parametrize("name", ["llama", "gpt2", *PLAIN])
def test_weights_are_shared_and_named_as_before(name: str) -> None:
    pair = compiled(name)
    before, after = pair.original.state_dict(), pair.quantized.state_dict()
    assert list(before) == list(after)
    assert all(before[key].data_ptr() == after[key].data_ptr() for key in before)


def test_the_original_is_left_as_it_was() -> None:
    model, text = tiny("llama"), ids(2, 40)
    attributes, generated = dict(vars(model)), model.generate(ids(1, 9), max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        logits = model(text).logits
    twin = kvmix_compile.apply(model, budget=3, calibration=ids(2, 64), sinks=0, recent=32)
    twin(text)
    assert vars(model) == attributes and type(model) is LlamaForCausalLM
    assert "forward" not in vars(model) and not hasattr(model, "kvmix_plan")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(text).logits, logits)
    assert torch.equal(model.generate(ids(1, 9), max_new_tokens=5, do_sample=False), generated)


def test_it_can_be_compiled_again_with_another_plan() -> None:
    pair = compiled("fused_arange")
    first, second = pair.quantized.kvmix_plan, pair.lossless.kvmix_plan
    assert first != second
    assert in_chunks(pair.quantized, ids(1, 80), (70, 10)).shape == in_chunks(pair.lossless, ids(1, 80), (70, 10)).shape


def test_a_deep_copy_has_its_own_weights() -> None:
    model, text = compiled("llama").quantized, ids(1, 30)
    copied = copy.deepcopy(model)
    expected = model(text).logits
    assert_close(copied(text).logits, expected)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert copied(text).logits.abs().max() == 0
    assert_close(model(text).logits, expected)


# What forward takes and returns


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loss_is_the_originals(name: str) -> None:
    text = ids(2, 60)
    labels = text.clone()
    labels[0, :20] = -100
    with torch.no_grad():
        expected = compiled(name).original(text, labels=labels).loss
    assert_close(compiled(name).quantized(text, labels=labels).loss, expected)


def test_logits_to_keep() -> None:
    model, text = compiled("llama").quantized, ids(2, 30)
    every = model(text).logits
    assert_close(model(text, logits_to_keep=1).logits, every[:, -1:])
    assert_close(model(text, logits_to_keep=7).logits, every[:, -7:])
    assert_close(model(text, logits_to_keep=torch.tensor([3, 29])).logits, every[:, [3, 29]])


def test_what_forward_returns() -> None:
    model, text = compiled("llama").quantized, ids(2, 30)
    output = model(text)
    assert isinstance(cache_in(output), KVMixCache) and cache_in(output).get_seq_length() == 30
    assert output.loss is None
    assert cache_in(model(text, use_cache=False)) is None
    logits, past = model(text, return_dict=False)
    assert_close(logits, output.logits)
    assert isinstance(past, KVMixCache)
    loss, logits, _ = model(text, labels=text, return_dict=False)
    assert loss.dim() == 0 and logits.shape == (2, 30, 128)


def test_a_plain_model_returns_its_logits() -> None:
    model, text = compiled("hand_written").quantized, ids(2, 30)
    logits = model(text)
    assert isinstance(logits, Tensor) and logits.shape == (2, 30, 128)
    output = model(text, past_key_values=KVMixCache(model))
    assert_close(output.logits, logits)
    assert cache_in(output).get_seq_length() == 30


def test_positions_may_be_given() -> None:
    text = ids(1, 30)
    later = torch.arange(30)[None] + 7
    with torch.no_grad():
        expected = compiled("gpt2").original(text, position_ids=later).logits
    assert_close(compiled("gpt2").quantized(text, position_ids=later).logits, expected)


def test_no_gradients_are_recorded() -> None:
    assert not compiled("llama").quantized(ids(1, 9)).logits.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_compiles(dtype: torch.dtype) -> None:
    original, text = tiny("llama").to(dtype), ids(1, 100)
    model = kvmix_compile.apply(original, budget=3, calibration=ids(2, 64), sinks=4, recent=32)
    past = KVMixCache(model)
    logits = model(text, past_key_values=past).logits
    with torch.no_grad():
        expected = original(text).logits
    assert logits.dtype == dtype
    assert (logits - expected).float().abs().max() < 0.1 * expected.float().std()
    assert past.nbytes == model.kvmix_plan.cache_bytes(100, 1, dtype)


def test_another_dtype_after_compiling_is_an_error() -> None:
    model = kvmix_compile.apply(plain.fused_arange(), budget=3, calibration=ids(2, 64), sinks=0, recent=32)
    model.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"converted from torch\.float32 to torch\.bfloat16.*apply again"):
        model(ids(1, 9))


def test_moving_to_where_it_is_changes_nothing() -> None:
    model = compiled("llama").quantized
    assert model.to("cpu") is model and model.eval() is model
    assert model(ids(1, 9)).logits.shape == (1, 9, 128)


# Perplexity


def test_perplexity_through_a_lossless_cache_is_the_originals() -> None:
    pair, text = compiled("llama"), ids(1, 300)[0]
    expected = kvmix_compile.perplexity(pair.original, text, chunk=32, window=128)
    assert kvmix_compile.perplexity(pair.lossless, text, chunk=32, window=128) == pytest.approx(expected, rel=1e-4)
    assert kvmix_compile.perplexity(pair.quantized, text, chunk=32, window=128) != pytest.approx(expected, rel=1e-4)


def test_perplexity_of_a_window_read_at_once_is_refused() -> None:
    with pytest.raises(InputError, match="never read"):
        kvmix_compile.perplexity(compiled("llama").quantized, ids(1, 300)[0], chunk=128, window=128)
    with pytest.raises(InputError, match="two tokens"):
        kvmix_compile.perplexity(compiled("llama").quantized, torch.tensor([3]))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_by_either_of_its_names(name: str) -> None:
    """Whichever transformers is installed, and without a warning."""
    model, text, past = compiled("llama").quantized, ids(1, 60), KVMixCache(compiled("llama").quantized)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(text, **{name: past})
        assert past.seen == 60
        longer = model.generate(ids(1, 63), max_new_tokens=2, eos_token_id=-1, **{name: past})
    assert longer.shape == (1, 65) and past.seen == 64


@pytest.mark.parametrize("call", ["__call__", "generate"])
def test_two_caches_by_two_names_are_refused(call: str) -> None:
    model = compiled("llama").quantized
    both = {name: KVMixCache(model) for name in CACHE_NAMES}
    with pytest.raises(InputError, match="cache and past_key_values are two names of one argument"):
        getattr(model, call)(ids(1, 10), **both)
    assert all(past.seen == 0 for past in both.values())


def test_errors_call_a_cache_what_the_model_calls_it() -> None:
    with pytest.raises(InputError, match=f"^{CACHE_ARGUMENT} is a DynamicCache"):
        compiled("llama").quantized(ids(1, 10), past_key_values=DynamicCache())
