"""The cache of a compiled model: what it holds, what it costs, and taking back, reordering and copying it."""

import copy
import gc
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kvmix_compile
from kvmix_compile import KVMixCache
from kvmix_compile.errors import CacheError, InputError
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, Precision
from kvmix_compile.models_zoo.tiny import WINDOW, tiny
from tests.helpers.one_capture import applied, zoo
from tests.helpers.toy_llama import RECENT, SINKS, ids, lossless, original, quantized

ROLLBACK = 16


def filled(model: PreTrainedModel, *parts: Tensor, rollback: int = 0) -> KVMixCache:
    past = KVMixCache(model, rollback=rollback)
    for part in parts:
        model(part, past_key_values=past)
    return past


def next_logits(model: PreTrainedModel, past: KVMixCache, part: Tensor) -> Tensor:
    """Leaves the cache as it was."""
    return model(part, past_key_values=copy.deepcopy(past)).logits


def tensors_of(past: KVMixCache) -> list[Tensor]:
    """Every tensor that hangs on the cache, found by the garbage collector and not by the cache itself."""
    found, seen, pending = {}, set(), [past.__dict__]
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found[item.untyped_storage().data_ptr()] = item
        else:
            pending += gc.get_referents(item)
    return list(found.values())


# Honesty


@pytest.mark.parametrize("tokens", [1, 4, 36, 37, 68, 69, 150, 511])
@pytest.mark.parametrize("rows", [1, 3])
def test_its_bytes_are_what_its_tensors_occupy_and_what_the_plan_said(tokens: int, rows: int) -> None:
    past = filled(quantized(), ids(rows, tokens))
    assert past.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(past))
    assert past.nbytes == quantized().kvmix_plan.cache_bytes(tokens, rows, torch.float32)


@cache
def windowed(name: str) -> PreTrainedModel:
    return applied(zoo(name), budget=2.3, calibration=ids(2, 128), sinks=SINKS, recent=RECENT)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama4"])
@pytest.mark.parametrize("rollback", [0, ROLLBACK])
def test_layers_with_a_window_or_chunks_keep_no_more_than_can_be_seen(name: str, rollback: int) -> None:
    model = windowed(name)
    past, longer = (filled(model, ids(2, tokens), rollback=rollback) for tokens in (150, 500))
    windows = [site.window for site in model.kvmix_plan.sites]
    assert set(windows) == ({WINDOW} if name == "mistral" else {WINDOW, 0})
    for window, state, of_longer in zip(windows, past.states, longer.states, strict=True):
        assert (of_longer.nbytes == state.nbytes) == (window > 0)
        assert not window or state.blocks * BLOCK_TOKENS < WINDOW + rollback + 2 * BLOCK_TOKENS - RECENT
    assert longer.nbytes == model.kvmix_plan.cache_bytes(500, 2, torch.float32, rollback)
    elements = sum(
        (site.key_elements + site.value_elements) * (site.window - 1 if site.window else 500)
        for site in model.kvmix_plan.sites
    )
    assert longer.bits_per_element == pytest.approx(8 * longer.nbytes / (2 * elements))


def test_growing_token_by_token_costs_what_was_predicted() -> None:
    past = filled(quantized(), ids(1, 30), rollback=ROLLBACK)
    for tokens in range(31, 111):
        quantized()(ids(1, 1), past_key_values=past)
        assert past.nbytes == quantized().kvmix_plan.cache_bytes(tokens, 1, torch.float32, ROLLBACK)


def test_long_texts_approach_the_plans_stored_bits() -> None:
    plan, past = quantized().kvmix_plan, filled(quantized(), ids(1, 500))
    assert plan.storage_bits < past.bits_per_element < 10
    assert past.bits_per_element < filled(quantized(), ids(1, 200)).bits_per_element
    elements = sum(site.key_elements + site.value_elements for site in plan.sites) * 500
    assert past.bits_per_element == pytest.approx(8 * past.nbytes / elements)
    assert KVMixCache(quantized()).bits_per_element == 0


# Room


def begun_whole(model: PreTrainedModel, rollback: int = 0) -> KVMixCache:
    """With room for all first and recent tokens from the beginning."""
    return KVMixCache(replace(model.kvmix_program.format, begins_whole=True), rollback)


def assert_hold_the_same(one: KVMixCache, other: KVMixCache) -> None:
    """Once both have all the room that either has: what is not used is zero."""
    one, other = copy.deepcopy(one), copy.deepcopy(other)
    assert (one.lengths.tolist(), one.seen, one.rollback) == (other.lengths.tolist(), other.seen, other.rollback)
    for first, second in zip(one.states, other.states, strict=True):
        first.grow(second.room), second.grow(first.room)
        assert all(map(torch.equal, first.tensors(), second.tensors()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_short_text_takes_hardly_more_than_in_the_models_own_cache(dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    compressed = kvmix_compile.apply(model, budget=2.3, calibration=ids(2, 128), verify=False)
    assert (compressed.kvmix_plan.sinks, compressed.kvmix_plan.recent) == (64, 128)
    for tokens in (1, 10, 33, 55, 129, 193, 200):
        past, own = KVMixCache(compressed), DynamicCache()
        for reader, held in ((compressed, past), (model, own)):
            reader(ids(3, tokens), past_key_values=held)
        assert past.nbytes <= 1.1 * sum(layer.keys.nbytes + layer.values.nbytes for layer in own.layers)


@cache
def exact(name: str) -> PreTrainedModel:
    return applied(zoo(name), plan=windowed(name).kvmix_plan, exact_chunks=True, verify=False)


@settings(max_examples=40)
@given(
    name=st.sampled_from(["llama", "mistral", "gemma3"]),
    is_exact=st.booleans(),
    rollback=st.sampled_from([0, ROLLBACK]),
    chunks=st.lists(st.integers(1, 3) | st.integers(1, 70), min_size=1, max_size=8),
    padding=st.integers(0, 60),
)
def test_a_cache_that_grew_is_one_that_began_whole(
    name: str, is_exact: bool, rollback: int, chunks: list[int], padding: int
) -> None:
    """Two rows, the second one padded; every chunk may be shorter than what is allocated whole."""
    model = exact(name) if is_exact else windowed(name)
    grown, whole = KVMixCache(model, rollback), begun_whole(model, rollback)
    mask = (torch.arange(sum(chunks)) >= torch.tensor([[0], [min(padding, sum(chunks) - 1)]])).long()
    for chunk in ids(2, sum(chunks)).split(chunks, dim=1):
        seen = grown.seen + chunk.shape[1]
        found, expected = (
            model(chunk, attention_mask=mask[:, :seen], past_key_values=past).logits for past in (grown, whole)
        )
        assert torch.equal(found, expected)
        assert grown.nbytes <= whole.nbytes == model.kvmix_plan.cache_bytes(seen, 2, torch.float32, rollback, True)
    assert_hold_the_same(grown, whole)


@settings(max_examples=25)
@given(first=st.integers(1, 60), steps=st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), max_size=6))
def test_room_to_take_tokens_back_grows_as_they_are_drafted(first: int, steps: list[tuple[int, float]]) -> None:
    model = windowed("gemma3")
    grown, whole = KVMixCache(model), begun_whole(model)
    for past in (grown, whole):
        past.activate_past_recording()
        model(ids(1, first), past_key_values=past, logits_to_keep=1)
    for number, (drafted, wrong) in enumerate(steps):
        text = ids(1, drafted, seed=number)
        found, expected = (model(text, past_key_values=past).logits for past in (grown, whole))
        assert torch.equal(found, expected)
        for past in (grown, whole):
            past.crop(-int(wrong * drafted))
    found, expected = (model(ids(1, 1), past_key_values=past).logits for past in (grown, whole))
    assert torch.equal(found, expected)
    assert grown.nbytes <= whole.nbytes


# History


@settings(max_examples=10)
@given(chunks=st.lists(st.integers(min_value=1, max_value=70), min_size=1, max_size=6))
def test_a_lossless_cache_holds_the_same_however_the_text_was_cut(chunks: list[int]) -> None:
    """Through a model only up to rounding: a chunk's projections are another matrix product than the whole text's."""
    text = ids(1, sum(chunks))
    whole, cut = filled(lossless(), text), filled(lossless(), *text.split(chunks, dim=1))
    assert cut.get_seq_length() == whole.get_seq_length() == text.shape[1]
    for first, second in zip(whole.states, cut.states, strict=True):
        for one, other in zip(first.tensors(), second.tensors(), strict=True):
            if one.dtype == torch.uint8:
                one, other = one.view(torch.float32), other.view(torch.float32)
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_same_text_in_the_same_chunks_is_the_same_bytes() -> None:
    parts = ids(2, 120).split([50, 1, 69], dim=1)
    first, second = filled(quantized(), *parts), filled(quantized(), *parts)
    assert all(torch.equal(one, other) for one, other in zip(first.tensors(), second.tensors(), strict=True))


def test_tokens_of_a_float32_model_are_float16_where_keys_and_values_are_quantized() -> None:
    first, *others = quantized().kvmix_plan.sites
    plan = replace(quantized().kvmix_plan, sites=(replace(first, value=Precision(16)), *others))
    for model, expected in (
        (quantized(), [torch.float16, torch.float16]),
        (applied(original(), plan=plan, verify=False), [torch.float32, torch.float16]),
        (lossless(), [torch.float32, torch.float32]),
    ):
        past = filled(model, ids(2, 120))
        assert [state.dtype for state in past.states] == expected
        assert all(each.dtype in (torch.uint8, state.dtype) for state in past.states for each in state.tensors())
        assert past.nbytes == model.kvmix_plan.cache_bytes(120, 2, torch.float32)


def test_the_first_layers_unquantized_tokens_do_not_depend_on_chunks() -> None:
    text = ids(1, 120)
    whole, cut = filled(quantized(), text), filled(quantized(), *text.split([50, 1, 69], dim=1))
    for index in (0, 1, 4, 5):  # sinks and recent window of keys and values
        torch.testing.assert_close(whole.tensors()[index], cut.tensors()[index])  # up to rounding to float16


# Taking back


@pytest.mark.parametrize("model", [quantized, lossless])
@pytest.mark.parametrize("held", [1, 30, 36, 37, 60, 69, 100])
@pytest.mark.parametrize("removed", [1, ROLLBACK])
def test_what_was_taken_back_was_never_there(model, held: int, removed: int) -> None:
    past = filled(model(), ids(2, held), ids(2, removed, seed=8), rollback=ROLLBACK)
    past.crop(-removed)
    assert past.get_seq_length() == held and past.lengths.tolist() == [held, held]
    never = filled(model(), ids(2, held), rollback=ROLLBACK)
    going_on = ids(2, 40, seed=9)
    torch.testing.assert_close(next_logits(model(), past, going_on), next_logits(model(), never, going_on))
    # And the cache goes on to hold the same.
    model()(going_on, past_key_values=past)
    model()(going_on, past_key_values=never)
    last = ids(2, 1, seed=10)
    torch.testing.assert_close(next_logits(model(), past, last), next_logits(model(), never, last))


def test_the_length_to_keep_may_be_given_instead() -> None:
    past = filled(quantized(), ids(1, 60), rollback=ROLLBACK)
    past.crop(55)
    assert past.get_seq_length() == 55
    past.crop(70)
    past.crop(0)
    assert past.get_seq_length() == 55


def test_everything_can_be_taken_back_from_a_short_text() -> None:
    past = filled(quantized(), ids(1, 20))
    past.crop(-20)
    assert past.get_seq_length() == 0
    expected = quantized()(ids(1, 50, seed=2)).logits
    torch.testing.assert_close(next_logits(quantized(), past, ids(1, 50, seed=2)), expected)


def test_rows_of_a_padded_batch_are_taken_back_by_their_own_length() -> None:
    text, mask = ids(2, 50), torch.ones(2, 50, dtype=torch.int64)
    mask[1, :30] = 0
    past = KVMixCache(quantized(), rollback=ROLLBACK)
    quantized()(text, attention_mask=mask, past_key_values=past)
    past.crop(-5)
    assert past.lengths.tolist() == [45, 15] and past.get_seq_length() == 45


def test_what_exists_in_quantized_form_only_cannot_be_taken_back() -> None:
    past = filled(quantized(), ids(1, 200), rollback=ROLLBACK)
    before = [tensor.clone() for tensor in past.tensors()]
    with pytest.raises(CacheError, match=r"KVMixCache\(model, rollback=\d+\)"):
        past.crop(-150)
    assert past.get_seq_length() == 200 and past.lengths.tolist() == [200]
    assert all(torch.equal(one, other) for one, other in zip(past.tensors(), before, strict=True))


@pytest.mark.parametrize("step", [5, 10, ROLLBACK])
@pytest.mark.parametrize("again", [0, 3])
def test_taking_back_again_and_again_is_right_or_refused(step: int, again: int) -> None:
    """Never are tokens read that the ring no longer holds, also where few were added in between."""
    text, past = ids(1, 200), filled(lossless(), ids(1, 200), rollback=ROLLBACK)
    held, last = 200, ids(1, 1, seed=3)
    for _ in range(8):
        try:
            past.crop(-step)
        except CacheError:
            break
        held -= step
        if again:
            lossless()(text[:, held : held + again], past_key_values=past)
            held += again
        never = filled(lossless(), text[:, :held])
        torch.testing.assert_close(
            next_logits(lossless(), past, last), next_logits(lossless(), never, last), atol=1e-4, rtol=1e-4
        )


# Rows


def test_reordered_rows_go_on_as_themselves() -> None:
    past, going_on = filled(quantized(), ids(3, 100)), ids(3, 5, seed=2)
    expected = next_logits(quantized(), past, going_on)
    order = torch.tensor([2, 0, 0])
    past.reorder_cache(order)
    torch.testing.assert_close(next_logits(quantized(), past, going_on[order]), expected[order])


def test_reordered_rows_keep_their_bytes_and_their_length() -> None:
    text, mask = ids(3, 90), torch.ones(3, 90, dtype=torch.int64)
    mask[1, :40] = 0
    past = KVMixCache(quantized())
    quantized()(text, attention_mask=mask, past_key_values=past)
    before, order = [tensor.clone() for tensor in past.tensors()], torch.tensor([1, 2, 0])
    past.reorder_cache(order)
    assert past.lengths.tolist() == [50, 90, 90]
    assert all(torch.equal(now, then[order]) for now, then in zip(past.tensors(), before, strict=True))


def test_rows_are_selected_and_repeated() -> None:
    past, plan = filled(quantized(), ids(3, 100)), quantized().kvmix_plan
    past.batch_select_indices(torch.tensor([1]))
    assert past.batch_size == 1 and past.nbytes == plan.cache_bytes(100, 1, torch.float32)
    past.batch_repeat_interleave(4)
    assert past.batch_size == 4 and past.nbytes == plan.cache_bytes(100, 4, torch.float32)
    assert all(torch.equal(tensor[0], tensor[3]) for tensor in past.tensors())
    logits = next_logits(quantized(), past, ids(1, 1).expand(4, 1))
    assert logits.shape == (4, 1, 128)


def test_rows_are_repeated_next_to_each_other() -> None:
    past = filled(quantized(), ids(2, 50))
    past.batch_repeat_interleave(2)
    first, second, third, _ = past.tensors()[0]
    assert torch.equal(first, second) and not torch.equal(second, third)


# Life


def test_a_reset_cache_is_a_new_one() -> None:
    past = filled(quantized(), ids(3, 100))
    past.reset()
    assert (past.get_seq_length(), past.nbytes, past.is_initialized) == (0, 0, False)
    # Another batch is welcome now.
    torch.testing.assert_close(quantized()(ids(1, 50), past_key_values=past).logits, quantized()(ids(1, 50)).logits)


def test_a_copy_goes_its_own_way() -> None:
    past = filled(quantized(), ids(1, 100))
    copied = copy.deepcopy(past)
    before = [tensor.clone() for tensor in past.tensors()]
    quantized()(ids(1, 60, seed=2), past_key_values=copied)
    assert (past.get_seq_length(), copied.get_seq_length()) == (100, 160)
    assert all(torch.equal(one, other) for one, other in zip(past.tensors(), before, strict=True))
    assert not {tensor.data_ptr() for tensor in past.tensors()} & {tensor.data_ptr() for tensor in copied.tensors()}


def test_an_empty_cache_says_so() -> None:
    past = KVMixCache(quantized())
    assert (past.get_seq_length(), past.batch_size, past.nbytes, past.is_initialized) == (0, 0, 0, False)
    past.reorder_cache(torch.tensor([0]))
    past.crop(-3)
    assert past.get_seq_length() == 0 and len(past) == 2


def test_it_tells_what_it_is() -> None:
    past = filled(quantized(), ids(2, 100))
    assert repr(past) == f"KVMixCache(2 rows, 100 tokens, {past.nbytes} bytes)"
    assert past.is_initialized and not past.is_compileable
    assert not past.is_croppable and KVMixCache(quantized(), rollback=3).is_croppable


# Misuse


def test_a_cache_of_transformers_is_refused() -> None:
    with pytest.raises(InputError, match="KVMixCache"):
        quantized()(ids(1, 9), past_key_values=DynamicCache())


def test_the_original_model_cannot_fill_it() -> None:
    with pytest.raises(CacheError, match="not to the original"):
        original()(ids(1, 9), past_key_values=KVMixCache(quantized()))


def test_the_cache_of_a_model_with_another_plan_is_refused() -> None:
    past = filled(lossless(), ids(1, 9))
    with pytest.raises(InputError, match="another plan"):
        quantized()(ids(1, 9), past_key_values=past)
    assert past.get_seq_length() == 9


def test_the_cache_of_a_model_of_another_dtype_is_refused() -> None:
    half = kvmix_compile.apply(tiny("llama").to(torch.bfloat16), plan=quantized().kvmix_plan, verify=False)
    with pytest.raises(InputError):
        half(ids(1, 9), past_key_values=filled(quantized(), ids(1, 9)))


def test_another_batch_is_refused() -> None:
    past = filled(quantized(), ids(2, 50))
    with pytest.raises(CacheError, match="2 rows and was given 3"):
        quantized()(ids(3, 1), past_key_values=past)
    assert past.get_seq_length() == 50 and past.batch_size == 2
