"""Autocast, inference mode and gradients around calls: neither what a twin answers nor its cache depends on them."""

import copy
import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvmix_compile
from kvmix_compile import KVMixCache
from kvmix_compile.kernels.ambient import as_captured
from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.toy_llama import RECENT, SINKS, ids, lossless, original, quantized

Mode = Callable[[], AbstractContextManager]

TOKENS, MORE = 120, 45


def bfloat16() -> AbstractContextManager:
    return torch.autocast("cpu", dtype=torch.bfloat16)


MODES: dict[str, Mode] = {
    "plain": nullcontext,
    "inference mode": torch.inference_mode,
    "autocast to bfloat16": bfloat16,
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "gradients": torch.enable_grad,
}


def continued(model: PreTrainedModel, past: KVMixCache) -> Tensor:
    """Logits of steps that write over the recent window and pack blocks; the cache is filled further."""
    text = ids(past.batch_size, MORE, seed=2)
    steps = [model(part, past_key_values=past).logits[:, -1].float() for part in text.split([1] * 35 + [10], dim=1)]
    return torch.stack(steps, dim=1)


def prompt(model: PreTrainedModel, rollback: int = 0) -> KVMixCache:
    past = KVMixCache(model, rollback=rollback)
    model(ids(2, TOKENS), past_key_values=past)
    return past


def tensors(past: KVMixCache) -> list[Tensor]:
    return [*past.tensors(), past.lengths]


@pytest.mark.parametrize("later", MODES)
@pytest.mark.parametrize("first", MODES)
def test_a_cache_begun_in_one_mode_goes_on_in_another(first: str, later: str) -> None:
    model = quantized()
    reference = prompt(model)
    expected = continued(model, reference)
    with MODES[first]():
        past = prompt(model)
    with MODES[later]():
        found = continued(model, past)
    # Logits have autocast's dtype, and are rounded to it.
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-2 if "autocast" in later else 0)
    assert all(map(torch.equal, tensors(past), tensors(reference)))
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors(past))


CHANGES: dict[str, Callable[[KVMixCache], object]] = {
    "crop": lambda past: past.crop(-5),
    "reorder": lambda past: past.reorder_cache(torch.tensor([1, 0])),
    "select": lambda past: past.batch_select_indices(torch.tensor([1])),
    "repeat": lambda past: past.batch_repeat_interleave(2),
    "reset": lambda past: past.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_changed_in_inference_mode_goes_on_outside(change: str) -> None:
    model = quantized()
    past, reference = prompt(model, rollback=8), prompt(model, rollback=8)
    CHANGES[change](reference)
    with torch.inference_mode():
        CHANGES[change](past)
        assert not any(tensor.is_inference() for tensor in tensors(past))
    if change == "reset":
        for cache in (past, reference):
            model(ids(2, TOKENS), past_key_values=cache)
    assert torch.equal(continued(model, past), continued(model, reference))


def loaded(past: KVMixCache, folder: Path) -> KVMixCache:
    past.save(folder / "cache")
    return KVMixCache.load(folder / "cache", quantized())


def unpickled(past: KVMixCache, folder: Path) -> KVMixCache:
    file = io.BytesIO()
    torch.save(past, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [lambda past, _: copy.deepcopy(past), loaded, unpickled], ids=["deepcopy", "load", "unpickled"]
)
def test_a_copy_made_in_inference_mode_goes_on_outside(copied, tmp_path: Path) -> None:
    model = quantized()
    past = prompt(model)
    with torch.inference_mode():
        made = copied(past, tmp_path)
    assert torch.equal(continued(model, made), continued(model, past))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_answers_as_the_original_does(dtype: torch.dtype) -> None:
    past = KVMixCache(lossless())
    text = ids(2, 200)
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        expected = original()(text).logits
        found = torch.cat([lossless()(part, past_key_values=past).logits for part in text.split([150, 1, 49], 1)], 1)
    assert found.dtype == expected.dtype == dtype
    exact = original()(text).logits.detach()
    # No further from the original under autocast than that is from itself without.
    assert (found - expected).float().square().mean() <= 1.1 * (expected - exact).float().square().mean()


def test_positions_far_out_are_not_rounded_under_autocast() -> None:
    """bfloat16 knows 8 bits of a position."""
    text = ids(1, 500)
    exact = lossless()(text).logits
    with bfloat16():
        found = lossless()(text).logits
    torch.testing.assert_close(found, exact.bfloat16())


def test_generate_under_autocast_gives_what_it_gives_without() -> None:
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    expected = quantized().generate(ids(2, 80), **options)
    with bfloat16():
        found = quantized().generate(ids(2, 80), **options)
    # A tie of rounded logits may fall otherwise.
    assert found.shape == expected.shape
    assert (found[:, :100] == expected[:, :100]).float().mean() > 0.95


OPTIONS = {"budget": 2.3, "calibration": ids(2, 128), "sinks": SINKS, "recent": RECENT}


@cache
def small() -> PreTrainedModel:
    return tiny("llama", num_hidden_layers=1)


@cache
def small_twin() -> PreTrainedModel:
    return kvmix_compile.apply(small(), **OPTIONS)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_compiled_alike_in_every_mode(mode: str) -> None:
    model, expected = small(), small_twin()
    with MODES[mode]():
        enabled = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        twin = kvmix_compile.apply(model, **OPTIONS)
        assert kvmix_compile.diagnose(model).problem is None
        assert enabled == (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        )  # fmt: skip
    assert twin.kvmix_plan == expected.kvmix_plan
    assert torch.equal(continued(twin, prompt(twin)), continued(expected, prompt(expected)))


def test_what_is_done_as_captured_leaves_the_modes_as_they_were_after_an_error() -> None:
    with torch.inference_mode(), bfloat16():
        with pytest.raises(ZeroDivisionError), as_captured():
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
            raise ZeroDivisionError
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
