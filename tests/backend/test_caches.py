"""torch.compile(model, backend="kvmix"): what belongs to a StaticCache, and what one is refused for."""

import copy
import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from kvmix_compile.backend import packed_cache
from kvmix_compile.backend import storage as storage_module
from kvmix_compile.errors import CacheError
from tests.helpers.agreement import assert_states_agree
from tests.helpers.cache_argument import with_cache
from tests.helpers.compiled import SLOTS, close, held, ids, logits, original, padded, static_cache, step


@pytest.fixture(autouse=True, scope="module")
def dynamo_begins_anew() -> Iterator[None]:
    """Once, so that what is compiled is compiled once; masks, autocast and inference mode each make another graph."""
    torch._dynamo.reset()
    step.cache_clear()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def storage_of(past: StaticCache) -> int:
    buffers = [buffer for layer in past.layers for buffer in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, buffers)}.values())


def test_the_16_bit_storage_is_released() -> None:
    past, adopted = static_cache("llama"), static_cache("llama")
    full = 2 * 2 * 2 * SLOTS * 32 * 4  # sides, rows, heads, slots, channels, bytes
    model = step(quantized=True)
    logits(model, past, ids(41), 40)
    original("llama")(ids(40), **with_cache(adopted))
    assert storage_of(adopted) == full
    logits(model, adopted, ids(1))
    for one in (past, adopted):
        assert storage_of(one) < 2000
        assert one.layers[0].keys.shape == (2, 2, SLOTS, 32)
        assert one.layers[0].keys.isnan().all()


def test_two_caches_used_in_turn_stay_separate() -> None:
    model, texts = step(quantized=False), [ids(80, seed=seed) for seed in (1, 2)]
    caches = [static_cache("llama"), static_cache("llama")]
    found: list[list[Tensor]] = [[], []]
    for begin, end in ((0, 60), *((token, token + 1) for token in range(60, 80))):
        for which in (0, 1):
            found[which].append(logits(model, caches[which], texts[which][:, begin:end], end - begin))
    for which in (0, 1):
        assert close(torch.cat(found[which], 1), original("llama")(texts[which], use_cache=False).logits)


def test_a_dropped_cache_frees_its_state() -> None:
    model, past = step(quantized=False), static_cache("llama")
    logits(model, past, ids(41), 40)
    gc.collect()
    before, packed = len(storage_module._packed_sites), held(past)
    tensors = {tensor.data_ptr() for tensor in packed.tensors()}
    del past, packed
    gc.collect()
    assert len(storage_module._packed_sites) == before - 2
    alive = {item.data_ptr() for item in gc.get_objects() if type(item) is Tensor and item.device.type == "cpu"}
    assert not tensors & alive


def test_a_cache_begins_anew_after_reset() -> None:
    model, past = step(quantized=False), static_cache("llama")
    first, again = ids(90, seed=1), ids(50, seed=2)
    logits(model, past, first, 60)
    past.reset()
    assert packed_cache(past) is None
    assert close(logits(model, past, again, 45), original("llama")(again, use_cache=False).logits)
    assert held(past).lengths.tolist() == [50, 50]


def test_a_cache_that_was_reset_can_be_used_without_being_compiled() -> None:
    past, text = static_cache("llama"), ids(50)
    logits(step(quantized=False), past, ids(41), 40)
    with pytest.raises(CacheError, match="reset"):
        original("llama")(text, **with_cache(past))
    past.reset()
    assert close(logits(original("llama"), past, text, 40), original("llama")(text, use_cache=False).logits)


def test_a_copy_of_a_cache_is_refused() -> None:
    model, past = step(quantized=False), static_cache("llama")
    logits(model, past, ids(41), 40)
    with pytest.raises(CacheError, match="copies do not have them"):
        logits(model, copy.deepcopy(past), ids(1))


def test_a_row_that_was_prompted_elsewhere_holds_what_it_would_hold_here() -> None:
    text, mask = padded(90)
    here, adopted, compiled = static_cache("llama"), static_cache("llama"), step(quantized=True)
    for model, past in ((compiled, here), (original("llama"), adopted)):
        logits(model, past, text, 90, attention_mask=mask)
    for past in (here, adopted):
        logits(compiled, past, text[:, :1], attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1))
    for one, other, layout in zip(held(here).states, held(adopted).states, held(here).layouts, strict=True):
        assert_states_agree(one, other, layout)


def test_it_runs_under_autocast_as_the_original_does() -> None:
    text = ids(100)
    with torch.no_grad():
        exact = logits(original("llama"), static_cache("llama"), text, 60)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            try:
                expected = logits(original("llama"), static_cache("llama"), text, 60)
            except RuntimeError:
                pytest.skip("this transformers' StaticCache does not run under autocast")
            found = logits(step(quantized=False), static_cache("llama"), text, 60)
    assert found.dtype == expected.dtype
    assert (found - expected).square().mean() <= 1.2 * (expected - exact).square().mean()


def test_a_prompt_read_in_inference_mode_is_decoded_outside() -> None:
    text, past, other = ids(100), static_cache("llama"), static_cache("llama")
    model = step(quantized=True)
    with torch.no_grad():
        expected = logits(model, other, text, 60)[:, 60:]
    with torch.inference_mode():
        logits(model, past, text[:, :60], 60)
    with torch.no_grad():
        found = logits(model, past, text[:, 60:])
    assert close(found, expected)
    assert not any(tensor.is_inference() for tensor in held(past).tensors())


# What is refused before anything is changed


def test_a_cache_of_another_plan_is_refused() -> None:
    past = static_cache("llama")
    logits(step(quantized=True), past, ids(40), 40)
    with pytest.raises(CacheError, match="another plan"):
        logits(step(quantized=False), past, ids(1))


def test_more_tokens_than_slots_are_refused() -> None:
    model, past = step(quantized=False), static_cache("llama", 32)
    logits(model, past, ids(32), 31)
    with pytest.raises(CacheError, match="33 tokens do not fit into a StaticCache of 32"):
        logits(model, past, ids(1))
    assert held(past).lengths.tolist() == [32, 32]


def test_padding_behind_tokens_is_refused() -> None:
    text, mask = ids(20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, -3:] = 0
    with pytest.raises(CacheError, match="model.layers.0.self_attn.*pad on the left"):
        logits(step(quantized=False), static_cache("llama"), text, 20, attention_mask=mask)


def test_a_mask_that_is_not_causal_is_refused() -> None:
    text, past = ids(20), static_cache("llama")
    everything = torch.zeros(2, 1, 20, SLOTS, dtype=torch.bool)
    everything[..., :20] = True
    with pytest.raises(CacheError, match="neither causal nor the window"):
        logits(step(quantized=False), past, text, 20, attention_mask=everything)


def test_a_cache_that_was_changed_from_outside_is_refused() -> None:
    model, past = step(quantized=False), static_cache("llama")
    logits(model, past, ids(41), 40)
    for layer in past.layers:
        layer.cumulative_length.fill_(20)
    with pytest.raises(CacheError, match="counts 20 tokens and 41 were written"):
        logits(model, past, ids(1))
