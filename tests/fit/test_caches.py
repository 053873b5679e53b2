"""What is said on paper is what really runs takes."""

from functools import cache

import pytest
import torch
from transformers import DynamicCache

from kvmix_compile import KVMixCache
from kvmix_compile.errors import BudgetError
from kvmix_compile.fit.caches import CacheKind, compressed, longest_context, plan_on_paper, unquantized
from kvmix_compile.fit.sketch import Sketch, sketch
from kvmix_compile.fit.weightless import weightless
from tests.helpers.cache_argument import with_cache
from tests.helpers.one_capture import applied, zoo
from tests.helpers.toy_llama import ids

# The second with a sliding window in every layer, the third in every second one.
MODELS = ("llama", "mistral", "gemma2")
ROWS, TOKENS = 2, 400


@cache
def drawn(name: str) -> Sketch:
    return sketch(weightless(zoo(name).config, torch.float32))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [1, 50, TOKENS])
def test_predicted_bytes_are_those_of_transformers_cache(name: str, tokens: int) -> None:
    model = zoo(name)
    held = DynamicCache(config=model.config)
    model(ids(ROWS, tokens), **with_cache(held))
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers)
    assert ROWS * unquantized("float32", drawn(name)).row_bytes(tokens) == nbytes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [2.3, 4])
def test_predicted_bytes_are_those_of_a_compressed_cache(name: str, budget: float) -> None:
    plan = plan_on_paper(drawn(name), budget, TOKENS)
    small = applied(zoo(name), plan=plan, verify=False)
    for tokens in (50, TOKENS):
        held = KVMixCache(small)
        small(ids(ROWS, tokens), **with_cache(held))
        assert ROWS * compressed("", drawn(name), plan, begins_whole=False).row_bytes(tokens) == held.nbytes


def test_a_state_of_fixed_size_is_counted_once_a_row() -> None:
    hybrid = drawn("lfm2")
    (state,) = hybrid.carried
    row_bytes = unquantized("float32", hybrid).row_bytes
    assert row_bytes(2) - state.row_bytes == 2 * (row_bytes(2) - row_bytes(1))


def test_a_plan_on_paper_spends_its_budget() -> None:
    layers = 10
    config = zoo("llama").config.__class__(**{**zoo("llama").config.to_dict(), "num_hidden_layers": layers})
    plan = plan_on_paper(sketch(weightless(config, torch.float32)), 2.3, 0)
    assert plan.code_bits == pytest.approx(2.3)
    assert 2.5 < plan.storage_bits <= 2.65
    with pytest.raises(BudgetError):
        plan_on_paper(drawn("llama"), 0.5, 0)


def test_eight_bits_without_scales_are_half_of_sixteen() -> None:
    shapes = drawn("llama")
    assert 4 * unquantized("fp8", shapes, itemsize=1).row_bytes(100) == unquantized("float32", shapes).row_bytes(100)


def test_the_longest_context_is_the_last_that_fits() -> None:
    for kind in (
        unquantized("float32", drawn("llama")),
        compressed("2.3", drawn("llama"), plan_on_paper(drawn("llama"), 2.3, 0)),
    ):
        memory = 10**7
        tokens = longest_context(kind, memory, ROWS)
        assert tokens is not None
        assert ROWS * kind.row_bytes(tokens) <= memory < ROWS * kind.row_bytes(tokens + 1)
        assert longest_context(kind, 0, ROWS) == 0


def test_where_windows_forget_all_else_any_context_fits() -> None:
    assert longest_context(unquantized("float32", drawn("mistral")), 10**6, 1) is None
    assert longest_context(CacheKind("nothing", 0.0, lambda tokens: 0), 0, 1) is None
