"""A cache in a file, and copied: what goes on from it is what would have gone on from the cache itself."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import kvmix_compile
from kvmix_compile import KVMixCache
from kvmix_compile.backend.storage import PackedCache
from kvmix_compile.errors import CacheError, KVMixError
from kvmix_compile.kernels.format.state import Room
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.runtime import cache_file
from kvmix_compile.runtime.cache_file import weights_fingerprint
from tests.helpers.one_capture import applied, zoo
from tests.helpers.toy_llama import ids, lossless, original, quantized

ROLLBACK = 16


def prompted(rollback: int = 0) -> KVMixCache:
    """Of a padded batch, some tokens taken back."""
    text, mask = ids(2, 120), torch.ones(2, 120, dtype=torch.int64)
    text[1, :50], mask[1, :50] = 0, 0
    past = KVMixCache(quantized(), rollback)
    quantized()(text, attention_mask=mask, past_key_values=past)
    past.crop(-rollback)
    return past


def going_on(past: KVMixCache, tokens: int, seed: int = 2) -> torch.Tensor:
    """The logits of a text behind what was prompted."""
    mask = (torch.arange(past.seen + tokens) >= torch.tensor([[0], [50]])).long()
    return quantized()(ids(2, tokens, seed), attention_mask=mask, past_key_values=past).logits


def same(one: KVMixCache, other: KVMixCache) -> bool:
    counts = [(past.seen, past.rollback, past.nbytes, past.lengths.tolist()) for past in (one, other)]
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return counts[0] == counts[1] and all(torch.equal(first, second) for first, second in pairs)


def saved(folder: Path) -> Path:
    prompted().save(folder / "prompt.safetensors")
    return folder / "prompt.safetensors"


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    past = prompted(ROLLBACK)
    past.save(tmp_path / "prompt.safetensors")
    loaded = KVMixCache.load(tmp_path / "prompt.safetensors", quantized())
    assert same(loaded, past) and loaded.tensors()[0].data_ptr() != past.tensors()[0].data_ptr()
    assert torch.equal(going_on(loaded, 70), going_on(past, 70))
    for cache in (loaded, past):
        cache.crop(-ROLLBACK)
    assert same(loaded, past)


def test_what_was_taken_back_before_saving_counts_after_loading(tmp_path: Path) -> None:
    """Of 16 tokens that can be taken back, 16 were."""
    past = prompted(ROLLBACK)
    past.save(tmp_path / "prompt.safetensors")
    for cache in (past, KVMixCache.load(tmp_path / "prompt.safetensors", quantized())):
        with pytest.raises(CacheError, match="cannot take back"):
            cache.crop(-ROLLBACK)


def test_generation_goes_on_from_a_file(tmp_path: Path) -> None:
    prompt, past = ids(1, 100), KVMixCache(quantized())
    quantized()(prompt, past_key_values=past)
    past.save(tmp_path / "prompt.safetensors")
    for seed in (2, 3):
        text = torch.cat((prompt, ids(1, 20, seed)), dim=1)
        loaded = KVMixCache.load(str(tmp_path / "prompt.safetensors"), quantized())
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1}
        answer = quantized().generate(text, past_key_values=loaded, **options)
        assert torch.equal(answer, quantized().generate(text, past_key_values=copy.deepcopy(past), **options))
        assert loaded.get_seq_length() == 139


def test_an_unused_cache_can_be_kept_too(tmp_path: Path) -> None:
    KVMixCache(quantized(), rollback=3).save(tmp_path / "nothing.safetensors")
    loaded = KVMixCache.load(tmp_path / "nothing.safetensors", quantized())
    assert not loaded.is_initialized and loaded.rollback == 3
    assert quantized()(ids(3, 9), past_key_values=loaded).logits.shape == (3, 9, 128)


def test_a_bfloat16_cache(tmp_path: Path) -> None:
    model = kvmix_compile.apply(tiny("llama").to(torch.bfloat16), plan=quantized().kvmix_plan, verify=False)
    past = KVMixCache(model)
    model(ids(2, 90), past_key_values=past)
    past.save(tmp_path / "half.safetensors")
    assert same(KVMixCache.load(tmp_path / "half.safetensors", model), past)
    with pytest.raises(CacheError, match="of another dtype"):
        KVMixCache.load(tmp_path / "half.safetensors", quantized())


def test_a_copy_and_the_original_go_on_differently() -> None:
    past = prompted()
    copied = copy.deepcopy(past)
    ways = [(past, 2), (copied, 3)]
    found = [going_on(cache, 50, seed) for cache, seed in ways]
    for logits, (cache, seed) in zip(found, ways, strict=True):
        alone = prompted()
        assert torch.equal(logits, going_on(alone, 50, seed))
        assert same(cache, alone)


# What does not fit

OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "plan": (lossless, "with another plan"),
    "weights": (
        lambda: kvmix_compile.apply(tiny("llama", seed=5), plan=quantized().kvmix_plan, verify=False),
        "with other weights",
    ),
    "architecture": (
        lambda: applied(zoo("qwen2"), budget=3, calibration=ids(2, 64), verify=False),
        "of another architecture",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_cache_of_another_model_is_refused(what: str, tmp_path: Path) -> None:
    model, message = OTHERS[what]
    with pytest.raises(CacheError, match=f"{message}.*read its text again"):
        KVMixCache.load(saved(tmp_path), model())


def test_one_weight_changed_is_another_model() -> None:
    before, changed = weights_fingerprint(original()), copy.deepcopy(original())
    assert weights_fingerprint(changed) == before == quantized().kvmix_program.weights
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert weights_fingerprint(changed) != before


def rewritten(file: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def with_tensors(file: Path, version: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """A file of another version whose tensors were others, as that version would have written it."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = change(load_file(file))
    digest = cache_file._digest(metadata["header"], tensors)
    save_file(tensors, file, metadata | {"version": version, "digest": digest})


def short(folder: Path) -> tuple[KVMixCache, Path]:
    """A cache that has neither all its sinks nor a recent window yet, and its file."""
    past, file = KVMixCache(quantized()), folder / "short.safetensors"
    quantized()(ids(2, 3), cache=past)
    past.save(file)
    return past, file


def test_a_short_cache_makes_a_small_file_and_goes_on_from_it(tmp_path: Path) -> None:
    past, file = short(tmp_path)
    assert past.states[0].room == Room(3, 0, 0)
    loaded = KVMixCache.load(file, quantized())
    assert same(loaded, past)
    for tokens in (1, 30, 1, 60):
        assert torch.equal(*(quantized()(ids(2, tokens), cache=one).logits for one in (past, loaded)))
    assert same(loaded, past)


def test_files_of_version_3_had_all_their_room(tmp_path: Path) -> None:
    past, file = short(tmp_path)
    format = replace(quantized().kvmix_program.format, begins_whole=True)
    whole = KVMixCache(format)
    quantized()(ids(2, 3), cache=whole)
    with_tensors(file, "3", lambda _: whole._named_tensors())
    loaded = KVMixCache.load(file, quantized())
    assert same(loaded, whole) and loaded.nbytes > past.nbytes
    for tokens in (1, 30, 1, 60):
        assert torch.equal(*(quantized()(ids(2, tokens), cache=one).logits for one in (past, loaded)))
    assert same(loaded, past)


def test_files_of_version_4_had_float32_tokens_of_float32_models(tmp_path: Path) -> None:
    past, file = prompted(), saved(tmp_path)

    def before(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        widened = {name: kept.float() if kept.dtype == torch.float16 else kept for name, kept in tensors.items()}
        widened["0.sink_v"][0, 0, 0, 0] = 1e6
        return widened

    with_tensors(file, "4", before)
    past.states[0].sink_v[0, 0, 0, 0] = torch.finfo(torch.float16).max
    assert same(KVMixCache.load(file, quantized()), past)


@pytest.mark.parametrize(("sinks", "slots"), [(2, 0), (5, 0), (3, 33)])
def test_room_that_is_not_that_of_the_text_is_refused(sinks: int, slots: int, tmp_path: Path) -> None:
    """Too little for three tokens; or more than the model's caches ever have, 4 sinks and 32 recent tokens."""
    _, file = short(tmp_path)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes = {"sink": sinks, "recent": slots}
        changed = {name: torch.zeros(2, 2, sizes[name[2:-2]], 32) for name in tensors if name[2:-2] in sizes}
        return tensors | changed

    with_tensors(file, "4", change)
    with pytest.raises(CacheError, match="is damaged: the room of site 0 is .* not that of 3 tokens"):
        KVMixCache.load(file, quantized())


def test_files_of_version_2_are_read(tmp_path: Path) -> None:
    """Where the recent window was called another name."""
    file = saved(tmp_path)
    with_tensors(file, "2", lambda kept: {name.replace("recent_", "tail_"): tensor for name, tensor in kept.items()})
    with safe_open(file, "pt") as opened:
        assert "1.tail_k" in opened.keys()  # noqa: SIM118
    assert same(KVMixCache.load(file, quantized()), prompted())


def test_the_names_and_dtypes_in_a_file_belong_to_its_version(tmp_path: Path) -> None:
    """Other ones need another version."""
    found = {(name.partition(".")[2], kept.dtype) for name, kept in load_file(saved(tmp_path)).items()}
    dtypes = {"sink": torch.float16, "packed": torch.uint8, "recent": torch.float16}
    expected = {(f"{part}_{side}", dtype) for part, dtype in dtypes.items() for side in "kv"}
    assert found == expected | {("", torch.int64)}
    assert cache_file.VERSION == 5


def flip(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["1.packed_v"][0, 0, 0, 0] ^= 1


def forget_a_tensor(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    del tensors["1.recent_k"]


def count_wrong(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["header"] = json.dumps(json.loads(metadata["header"]) | {"seen": 7})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is damaged"),
    "emptied": (lambda file: file.write_bytes(b""), "is damaged"),
    "a flipped bit": (lambda file: rewritten(file, flip), "is damaged"),
    "a tensor less": (lambda file: rewritten(file, forget_a_tensor), "is damaged"),
    "another count": (lambda file: rewritten(file, count_wrong), "is damaged"),
    "something else": (lambda file: save_file({"weight": torch.ones(3)}, file), "not one that KVMixCache.save wrote"),
    "of a later version": (
        lambda file: rewritten(file, lambda _, metadata: metadata.update(version="99")),
        "by a version of kvmix_compile that keeps caches otherwise",
    ),
    "gone": (lambda file: file.unlink(), "cannot read the cache"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_refused(what: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[what]
    file = saved(tmp_path)
    damage(file)
    with pytest.raises(CacheError, match=message):
        KVMixCache.load(file, quantized())


def test_a_file_that_cannot_be_written_says_so_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match="cannot write the cache"):
        prompted().save(tmp_path / "nowhere" / "prompt.safetensors")
    file = saved(tmp_path)
    before = file.read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("kvmix_compile.runtime.cache_file.save_file", full)
    with pytest.raises(CacheError, match="no space left"):
        prompted().save(file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_what_the_backend_packed_is_not_saved() -> None:
    past = PackedCache(quantized().kvmix_program.format)
    with pytest.raises(KVMixError, match="of no use without the StaticCache"):
        past.save("nowhere")
