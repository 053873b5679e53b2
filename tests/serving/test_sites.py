"""Which site of a plan a layer of vLLM's is, and how its keys and values are stored."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvmix_compile.errors import PlanError
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.passes.allocate.plan import Plan, SitePlan
from kvmix_compile.passes.rewrite.stored_form import in_stored_form
from kvmix_vllm.sites import Basis, site_of

TIERS = "00000000111111112222222233333333"


def site(number: int, heads: int = 2, window: int = 0) -> SitePlan:
    """All that can be done to keys and values."""
    return SitePlan(
        f"model.layers.{number}.self_attn",
        SiteShape(heads, 32, 32, window),
        key=Precision(2, 32, 4, important_bits=(4,)),
        value=Precision(2, 32, 4),
        channel_tiers=tuple(TIERS[shift:] + TIERS[:shift] for shift in range(heads)),
        key_exponents=tuple(range(heads)),
        value_exponents=tuple(range(-1, heads - 1)),
        values_rotated=True,
    )


def plan(**options: int) -> Plan:
    return Plan((site(0, **options), site(1, **options)), policy="fisher", fingerprint="none", sinks=4, recent=32)


def layer(
    name: str = "model.layers.1.self_attn.attn", heads: int = 2, size: int = 32, window: int | None = None
) -> Any:
    attention = SimpleNamespace(scale=0.5, softcap=0.0, sink_logits=None, slopes=None)
    return SimpleNamespace(
        layer_name=name, num_kv_heads=heads, head_size=size, head_size_v=size, sliding_window=window, impl=attention
    )


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.attn", "language_model.model.layers.1.attention"])
def test_a_layer_is_that_of_its_number(name: str) -> None:
    found = site_of(layer(name), plan(), rank=0, ranks=1)
    assert found.name == "model.layers.1.self_attn" and found.stored == plan().stored_sites()[1]
    assert found.weighting.scale == 0.5


def test_a_rank_has_what_the_plan_says_of_its_heads() -> None:
    found = [site_of(layer(heads=2), plan(heads=4), rank, ranks=2).stored for rank in range(2)]
    whole = plan(heads=4).stored_sites()[1]
    assert [*found[0].channel_order, *found[1].channel_order] == whole.channel_order
    assert (*found[0].key_exponents, *found[1].key_exponents) == whole.key_exponents
    assert all(one.layout.kv_heads == 2 for one in found)


@pytest.mark.parametrize(
    "other",
    [layer("model.layers.2.self_attn.attn"), layer(heads=4), layer(size=64), layer("model.attn")],
    ids=["number", "heads", "size", "none"],
)
def test_another_model_is_refused(other: Any) -> None:
    with pytest.raises(PlanError, match="another model"):
        site_of(other, plan(), rank=0, ranks=1)


@pytest.mark.parametrize("window", [None, 200])
def test_a_layer_that_sees_more_than_is_kept_is_refused(window: int | None) -> None:
    with pytest.raises(PlanError, match="the last 100 tokens"):
        site_of(layer(window=window), plan(window=100), rank=0, ranks=1)
    assert site_of(layer(window=90), plan(window=100), rank=0, ranks=1).weighting.sliding_window == 90


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_stored_as_a_compiled_model_stores_them(dtype: torch.dtype) -> None:
    stored = plan().stored_sites()[0]
    key, value = torch.randn(2, 1, 2, 7, 32, dtype=dtype)
    basis = Basis.of(stored, query_heads=4, like=key)
    own_key, own_value = in_stored_form(key, value, stored)
    assert torch.equal(basis.of_keys(key[0].transpose(0, 1)), own_key[0].transpose(0, 1))
    assert torch.equal(basis.of_values(value[0].transpose(0, 1)), own_value[0].transpose(0, 1))


def test_queries_score_keys_as_before_and_outputs_are_as_before() -> None:
    stored = plan().stored_sites()[0]
    query, (key, value) = torch.randn(7, 4, 32), torch.randn(2, 7, 2, 32)
    basis = Basis.of(stored, query_heads=4, like=key)

    def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (one.repeat_interleave(2, dim=1).transpose(0, 1) for one in (key, value))
        return ((query.transpose(0, 1) @ key.mT).softmax(-1) @ value).transpose(0, 1)

    found = attended(basis.of_queries(query), basis.of_keys(key), basis.of_values(value))
    torch.testing.assert_close(basis.of_output(found), attended(query, key, value), rtol=1e-4, atol=1e-4)


def test_nothing_is_done_where_a_plan_asks_for_nothing() -> None:
    bare = replace(
        site(0), key=Precision(2, 32, 4), channel_tiers=(), key_exponents=(), value_exponents=(), values_rotated=False
    )
    stored = replace(plan(), sites=(bare,)).stored_sites()[0]
    rows = torch.randn(7, 2, 32)
    basis = Basis.of(stored, query_heads=2, like=rows)
    assert basis == Basis()
    assert all(change(rows) is rows for change in (basis.of_queries, basis.of_keys, basis.of_values, basis.of_output))
