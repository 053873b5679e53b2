"""exact_chunks: what a token reads does not depend on how its text came in."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from kvmix_compile import KVMixCache, Plan
from kvmix_compile.errors import CacheError, PlanError
from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.cache_argument import with_cache
from tests.helpers.one_capture import applied
from tests.helpers.toy_llama import RECENT, SINKS, ids, original, quantized

TOKENS, PADDING = 180, 37
# The second has windows and a soft cap.
MODELS = ("llama", "gemma2")


@cache
def exact(name: str) -> PreTrainedModel:
    if name == "llama":
        return applied(original(), plan=quantized().kvmix_plan, exact_chunks=True, verify=False)
    model = tiny(name)
    options = {"calibration": ids(2, 128), "sinks": SINKS, "recent": RECENT, "verify": False}
    return applied(model, budget=2.3, exact_chunks=True, **options)


TEXT = ids(2, TOKENS)
MASK = torch.ones_like(TEXT).index_put((torch.tensor([1]), torch.arange(PADDING)[:, None]), torch.tensor(0))


@torch.no_grad()
def read(model: PreTrainedModel, cuts: list[int], past: KVMixCache | None = None) -> tuple[Tensor, KVMixCache]:
    """The logits at every token that is no padding, and the cache."""
    past = KVMixCache(model) if past is None else past
    begin = past.seen
    found = [
        model(TEXT[:, first:end], attention_mask=MASK[:, :end], **with_cache(past)).logits
        for first, end in zip([begin, *cuts], [*cuts, TOKENS], strict=True)
    ]
    return torch.cat(found, dim=1)[MASK[:, begin:].bool()], past


@cache
def token_by_token(name: str) -> Tensor:
    return read(exact(name), list(range(1, TOKENS)))[0]


def same(found: Tensor, expected: Tensor, rounding: float = 1e-5) -> bool:
    """But for rounding, which may turn a code."""
    difference = (found - expected).abs() / expected.std()
    return bool(difference.median() < rounding and difference.max() < 5e-3)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=3)
@given(cuts=st.sets(st.integers(1, TOKENS - 1), max_size=4))
def test_however_a_text_is_cut(name: str, cuts: set[int]) -> None:
    found, _ = read(exact(name), sorted(cuts))
    assert same(found, token_by_token(name))


def test_without_it_the_cut_is_seen() -> None:
    """What this is for: the tokens of one call see each other in full precision."""
    one_by_one, _ = read(quantized(), list(range(1, TOKENS)))
    at_once, _ = read(quantized(), [])
    assert (at_once - one_by_one).abs().max() > 0.5 * one_by_one.std()
    # Of a token itself the keys and values are those of float32 here, and not the float16 that the others read.
    assert same(one_by_one, token_by_token("llama"), rounding=5e-4)


def test_positions_are_counted_though_keys_that_are_rounded_to_float16_weigh_more() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data *= 16
    numbering = applied(model, plan=quantized().kvmix_plan, exact_chunks=True).kvmix_program.numbering
    assert numbering == quantized().kvmix_program.numbering


def test_saved_loaded_and_copied(tmp_path: Path) -> None:
    model = exact("llama")
    past = KVMixCache(model)
    with torch.no_grad():
        model(TEXT[:, :100], attention_mask=MASK[:, :100], **with_cache(past))
    past.save(tmp_path / "prefix.cache")
    expected = token_by_token("llama")
    behind = torch.cat([torch.arange(TOKENS)[row.bool()] >= 100 for row in MASK])
    for kept in (copy.deepcopy(past), KVMixCache.load(tmp_path / "prefix.cache", model), past):
        found, _ = read(model, [130], kept)
        assert same(found, expected[behind])


def test_a_cache_of_a_model_that_reads_otherwise_is_refused(tmp_path: Path) -> None:
    _, past = read(exact("llama"), [])
    past.save(tmp_path / "prefix.cache")
    with pytest.raises(CacheError, match="with another plan"):
        KVMixCache.load(tmp_path / "prefix.cache", quantized())


def test_by_the_backend_too() -> None:
    torch._dynamo.reset()
    model, plan = tiny("llama"), quantized().kvmix_plan
    compiled = torch.compile(model, backend="kvmix", options={"plan": plan, "exact_chunks": True, "backend": "eager"})
    text = TEXT[:1]
    with torch.no_grad():
        found = compiled(input_ids=text, **with_cache(StaticCache(model.config, max_cache_len=TOKENS))).logits
    torch._dynamo.reset()
    assert same(found[0], token_by_token("llama")[:TOKENS])


def test_a_plan_keeps_it(tmp_path: Path) -> None:
    plan = exact("llama").kvmix_plan
    assert plan == replace(quantized().kvmix_plan, exact_chunks=True)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    path = tmp_path / "plan.json"
    assert applied(original(), plan=path, verify=False).kvmix_plan.exact_chunks
    assert not applied(original(), plan=path, exact_chunks=False, verify=False).kvmix_plan.exact_chunks


def test_anything_but_yes_and_no_is_refused() -> None:
    with pytest.raises(PlanError, match="exact_chunks is True or False, not 64"):
        applied(original(), plan=quantized().kvmix_plan, exact_chunks=64)
