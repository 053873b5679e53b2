"""Absorb: narrower rows are attended to in the place of keys and values, with the weights that the model has now."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvmix_compile import KVMixCache, Plan
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.export import capture
from kvmix_compile.passes.graph.vocabulary import operation
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.rewrite.absorb import absorb
from tests.helpers.one_capture import applied, zoo
from tests.helpers.toy_llama import RECENT, SINKS, ids, unquantized
from tests.passes.match.test_latents import (
    of_a_latent_and_a_rotary_key,
    of_a_latent_each,
    with_low_rank_adapter,
    worked_on,
)


def absorbed(captured: Captured) -> Captured:
    return absorb(captured, find_sites(captured).matched)[0]


def logits(captured: Captured) -> Tensor:
    text, position = ids(2, 20) % captured.vocabulary, torch.arange(20)
    with torch.no_grad():
        return captured.module(text, position.expand(2, -1), position)


def test_a_latent_is_attended_to_as_one_head_of_values_that_are_keys_too(captured) -> None:
    graph = absorbed(captured("deepseek_v3"))
    for site in find_sites(graph).matched:
        assert (site.query_heads, site.kv_heads, site.key_dim, site.value_dim) == (4, 1, 16, 64)
        assert site.values_are_keys and site.attention == "causal, values are keys"
    torch.testing.assert_close(logits(graph), logits(captured("deepseek_v3")), atol=1e-4, rtol=1e-4)


def test_weights_are_the_models_own_and_may_change(captured) -> None:
    graph, original = absorbed(captured("deepseek_v3")), captured("deepseek_v3")
    weight = original.model.model.layers[1].self_attn.kv_b_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
        try:
            torch.testing.assert_close(logits(graph), logits(original), atol=1e-4, rtol=1e-4)
        finally:
            weight.copy_(before)
    assert not list(graph.module.buffers(recurse=False))


def test_nothing_more_is_assumed_of_sizes(captured) -> None:
    original = captured("deepseek_v3")
    before = len(original.tokens.node.shape_env.guards)
    find_sites(absorbed(original))
    assert len(original.tokens.node.shape_env.guards) == before


def test_the_record_says_how_many_numbers_of_how_many(captured) -> None:
    for name, matched, skipped in (
        ("deepseek_v3", ("2 sites: 80 numbers a token instead of 320",), ()),
        ("llama", (), ()),
        (
            "mpt",
            (),
            (
                "2 sites: keys and values made of 2 times fewer numbers: to attend to these takes 4 times as many "
                "products",
            ),
        ),
    ):
        graph, record = absorb(captured(name), find_sites(captured(name)).matched)
        assert (record.name, record.matched, record.skipped) == ("latents", matched, skipped)
        assert (graph is captured(name)) == (not matched)


def test_attention_that_is_spelled_out() -> None:
    original = capture(tiny("deepseek_v3", num_hidden_layers=1, attn_implementation="eager"))
    graph = absorbed(original)
    (site,) = find_sites(graph).matched
    assert site.values_are_keys and operation(site.output) == "matmul"
    torch.testing.assert_close(logits(graph), logits(original), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("attend", "shape", "values_are_keys"),
    [
        (of_a_latent_and_a_rotary_key, (4, 8), True),
        (of_a_latent_each, (8, 8), False),
        (with_low_rank_adapter, (8, 8), False),
    ],
)
def test_rows_however_they_are_made(
    capture_toy, attend: Callable[..., Tensor], shape: tuple[int, int], values_are_keys: bool
) -> None:
    original = capture_toy(attend)
    graph = absorbed(original)
    (site,) = find_sites(graph).matched
    assert (site.kv_heads, site.key_dim, site.value_dim) == (1, *shape)
    assert site.values_are_keys == values_are_keys
    torch.testing.assert_close(logits(graph), logits(original), atol=1e-4, rtol=1e-4)


def test_where_nothing_is_narrower_the_graph_is_the_same(capture_toy) -> None:
    original = capture_toy(worked_on)
    assert absorbed(original) is original


def plan_of(bits: float, **options: object) -> Plan:
    rows = ids(2, 128)
    return applied(zoo("deepseek_v3"), budget=bits, calibration=rows, sinks=SINKS, recent=RECENT, **options).kvmix_plan


def read(plan: Plan, *chunks: int) -> Tensor:
    model = applied(zoo("deepseek_v3"), plan=plan)
    past, text = KVMixCache(model), ids(2, sum(chunks))
    return torch.cat([model(part, past_key_values=past).logits for part in text.split(chunks, dim=1)], dim=1)


def test_what_is_done_to_keys_and_values_is_done_to_the_queries() -> None:
    """Rotated, divided by powers of two, and in an order of their own, they give the original's logits where none are
    packed yet, but for what keeping them as float16 rounds off.
    """
    plan = plan_of(3)
    changed = {
        "key": Precision(4, 32, 4, important_bits=(8, 8)),
        "channel_tiers": ("0123" * 4,),
        "key_exponents": (3,),
        "value": Precision(8, 32, 4),
        "value_exponents": (-2,),
        "values_rotated": True,
    }
    plan = replace(plan, sites=tuple(replace(site, **changed) for site in plan.sites), sinks=64, recent=128)
    expected = zoo("deepseek_v3")(ids(2, 131)).logits
    torch.testing.assert_close(read(plan, 100, 1, 30), expected, atol=0.02, rtol=1e-3)


def test_a_cache_holds_no_more_numbers_than_the_models_own() -> None:
    model = applied(zoo("deepseek_v3"), plan=unquantized(plan_of(3)))
    assert model.kvmix_report.token_bytes == model.kvmix_report.own_cache_bytes == 2 * 80 * 4
    expected = zoo("deepseek_v3")(ids(2, 131)).logits
    torch.testing.assert_close(read(model.kvmix_plan, 100, 1, 30), expected, atol=2e-4, rtol=1e-3)
