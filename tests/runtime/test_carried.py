"""Hybrids: what layers carry besides keys and values goes with the cache, through whatever is done with it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import kvmix_compile
from kvmix_compile import KVMixCache
from kvmix_compile.errors import CacheError, CompilationError, InputError
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.runtime import cache_file
from tests.helpers.one_capture import applied, zoo
from tests.helpers.toy_llama import ids, lossless_twin, quantized_twin

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
STATE_BYTES = 128 * 3 * 4  # of the convolution of tiny("lfm2"), a row


def original() -> PreTrainedModel:
    return zoo("lfm2")


def quantized() -> PreTrainedModel:
    """At 2.3 bits."""
    return quantized_twin("lfm2")


def lossless() -> PreTrainedModel:
    """Nothing quantized."""
    return lossless_twin("lfm2")


def left_padded() -> dict[str, Tensor]:
    text, mask = ids(2, 60), torch.ones(2, 60, dtype=torch.int64)
    text[0, :7], mask[0, :7] = 0, 0
    return {"input_ids": text, "attention_mask": mask}


def prompted(model: PreTrainedModel, rows: int = 1, tokens: int = 60) -> KVMixCache:
    past = KVMixCache(model)
    model(ids(rows, tokens), cache=past)
    return past


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "bamba"])
@torch.no_grad()
def test_a_twin_reads_and_writes_what_the_original_does(name: str) -> None:
    model = zoo(name)
    twin = applied(model, budget=16)
    assert twin.kvmix_report.verified < 1e-3
    expected, found = (one.generate(**left_padded(), **GREEDY) for one in (model, twin))
    assert torch.equal(found, expected)
    text, past = ids(2, 40), KVMixCache(twin)
    pieces = [twin(part, cache=past).logits for part in text.split((20, 1, 4, 15), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(text).logits, atol=1e-3, rtol=1e-3)


def test_quantized_it_writes_too() -> None:
    output = quantized().generate(**left_padded(), **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert output.sequences.shape == (2, 72) and all(logits.isfinite().all() for logits in output.logits)


def test_beams_take_their_states_along() -> None:
    options = {**GREEDY, "num_beams": 3}
    assert torch.equal(lossless().generate(ids(2, 40), **options), original().generate(ids(2, 40), **options))


def test_rows_change_places_with_what_they_carry() -> None:
    past = prompted(quantized(), rows=3)
    ((before,),) = past.carried
    past.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(past.carried[0][0], before[[2, 0, 0]])
    past.batch_repeat_interleave(2)
    assert past.carried[0][0].shape[0] == 6


def test_what_is_carried_counts_among_the_bytes() -> None:
    past = prompted(quantized(), rows=2)
    assert past.carried_nbytes == 2 * STATE_BYTES
    assert past.nbytes == past.carried_nbytes + quantized().kvmix_plan.cache_bytes(60, 2, torch.float32)


def test_a_cache_that_forgets_begins_anew() -> None:
    past = prompted(quantized())
    past.reset()
    assert past.carried == () and past.carried_nbytes == 0
    assert torch.equal(quantized()(ids(1, 20), cache=past).logits, quantized()(ids(1, 20)).logits)


def test_a_copy_goes_on_by_itself() -> None:
    past = prompted(quantized())
    other, ((state,),) = copy.deepcopy(past), past.carried
    quantized()(ids(1, 5, seed=2), cache=other)
    assert torch.equal(past.carried[0][0], state) and not torch.equal(other.carried[0][0], state)


def test_what_is_loaded_goes_on_as_what_was_saved(tmp_path: Path) -> None:
    past, file = prompted(quantized(), rows=2), tmp_path / "prompt.safetensors"
    past.save(file)
    loaded = KVMixCache.load(file, quantized())
    assert loaded.nbytes == past.nbytes
    first, second = (quantized()(ids(2, 9, seed=2), cache=one).logits for one in (past, loaded))
    assert torch.equal(first, second)


def test_an_empty_cache_can_be_saved(tmp_path: Path) -> None:
    KVMixCache(quantized()).save(tmp_path / "empty.safetensors")
    assert KVMixCache.load(tmp_path / "empty.safetensors", quantized()).carried == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("carried.0.0"), r"carried\.0\.0"),
        (lambda tensors: tensors.update({"carried.0.1": torch.zeros(2, 3)}), r"carried\.0\.1"),
        (lambda tensors: tensors.update({"carried.0.0": torch.zeros(2, 128, 2)}), r"carried\.0\.0 is .*2\], not"),
    ],
    ids=["missing", "one too many", "misshapen"],
)
def test_a_file_with_other_states_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    past, file = prompted(quantized(), rows=2), tmp_path / "prompt.safetensors"
    past.save(file)
    tensors = load_file(file)
    change(tensors)
    cache_file.write(file, past._header(), tensors)
    with pytest.raises(CacheError, match=said):
        KVMixCache.load(file, quantized())


def test_a_step_that_fails_leaves_the_states_as_they_were() -> None:
    past = prompted(lossless())
    other, norm = copy.deepcopy(past), original().model.embedding_norm
    weight = norm.weight
    norm.weight = torch.nn.Parameter(torch.ones(7))  # behind all layers
    try:
        with pytest.raises(RuntimeError):
            lossless()(ids(1, 6, seed=3), cache=past)
    finally:
        norm.weight = weight
    first, second = (lossless()(ids(1, 6, seed=3), cache=one).logits for one in (past, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("asked", [lambda past: past.crop(-3), lambda past: past.activate_past_recording()])
def test_tokens_are_not_taken_back(asked: Any) -> None:
    past = prompted(quantized())
    with pytest.raises(CacheError, match=r"model\.layers\.0\.conv carries a state.*deepcopy"):
        asked(past)
    assert past.seen == 60
    past.crop(0)
    with pytest.raises(CacheError, match=r"rollback=4.*model\.layers\.0\.conv"):
        KVMixCache(quantized(), rollback=4)


@pytest.mark.parametrize("asked", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny("llama")}])
def test_assisted_generation_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"takes tokens back.*model\.layers\.0\.conv"):
        quantized().generate(ids(1, 20), **GREEDY, **asked)


def test_padding_that_would_go_into_a_state_is_refused() -> None:
    behind = torch.ones(2, 20, dtype=torch.int64)
    behind[0, -3:] = 0
    with pytest.raises(InputError, match=r"between or behind.*model\.layers\.0\.conv"):
        quantized()(ids(2, 20), attention_mask=behind)
    past = prompted(quantized(), rows=2, tokens=20)
    later = torch.ones(2, 24, dtype=torch.int64)
    later[0, 20:22] = 0
    with pytest.raises(InputError, match=r"behind what the cache holds.*model\.layers\.0\.conv"):
        quantized()(ids(2, 4), attention_mask=later, cache=past)
    assert past.seen == 20


def test_inductor_does_not_compile_it() -> None:
    with pytest.raises(CompilationError, match=r"model\.layers\.0\.conv \(Lfm2ShortConv\).*without compile=True"):
        applied(original(), budget=2.3, compile=True)


def test_the_report_says_what_is_carried() -> None:
    assert f"model.layers.0.conv: carries a state of {STATE_BYTES} bytes a row" in str(quantized().kvmix_report)
    assert "carries a state" in str(kvmix_compile.diagnose(original()))


def test_a_copy_of_a_twin_calls_modules_of_its_own() -> None:
    twin = copy.deepcopy(lossless())
    with torch.no_grad():
        twin.get_submodule("model.layers.0.conv").out_proj.weight.zero_()
    assert not torch.equal(twin(ids(1, 20)).logits, lossless()(ids(1, 20)).logits)
