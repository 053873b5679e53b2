"""Values that are stored rotated come back as they were, and a plan says which are."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvmix_compile import KVMixCache, Plan
from kvmix_compile.kernels.format.packing import dequantize_block, quantize_block
from kvmix_compile.kernels.format.precision import Axis, Precision
from kvmix_compile.passes.allocate.plan import VERSION, PlanError
from kvmix_compile.passes.rewrite.rotation import back, block_of, there
from tests.helpers.one_capture import applied, zoo
from tests.helpers.toy_llama import RECENT, SINKS, ids, quantized, unquantized

DIMS = (1, 8, 24, 32, 64, 80, 96, 128, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dim", DIMS)
def test_there_and_back_are_inverses_without_rounding(dim: int, dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype)
    one, other = there(dim, like).double(), back(dim, like).double()
    assert one.shape == (dim, dim) and there(dim, like).dtype == dtype
    assert torch.equal(one @ other, torch.eye(dim, dtype=torch.float64))
    for matrix in (one, other):
        entries = matrix[matrix != 0].abs()
        assert (entries == entries[0]).all() and torch.frexp(entries[0]).mantissa == 0.5
    assert (one[0] != 0).sum() == block_of(dim)


@pytest.mark.parametrize("dim", DIMS)
def test_values_keep_their_size_and_in_float16_do_not_overflow(dim: int) -> None:
    values = torch.randn(1000, dim)
    assert 0.5 < (values @ there(dim, values)).std() / values.std() < 2
    largest = torch.full((4, dim), torch.finfo(torch.float16).max, dtype=torch.float16)
    turned = largest @ there(dim, largest)
    assert turned.isfinite().all()
    torch.testing.assert_close(turned @ back(dim, largest), largest)


def error(values: Tensor, precision: Precision) -> Tensor:
    packed = quantize_block(values, precision, Axis.CHANNELS)
    return (
        (dequantize_block(packed, precision, Axis.CHANNELS, values.shape[-1], torch.float32) - values).square().mean()
    )


def test_a_loud_channel_costs_less_where_all_share_it() -> None:
    values, precision = torch.randn(8, 32, 64), Precision(2, 32, 4)
    values[..., 5] *= 30
    rotated = values @ there(64, values)
    share = error(rotated, precision) / rotated.square().mean()
    assert share < 0.7 * error(values, precision) / values.square().mean()


def rotated(plan: Plan) -> Plan:
    return replace(plan, sites=tuple(replace(site, values_rotated=True) for site in plan.sites))


@cache
def plan_of(name: str) -> Plan:
    return applied(zoo(name), budget=3, calibration=ids(2, 128), sinks=SINKS, recent=RECENT).kvmix_plan


def read(model: PreTrainedModel, *chunks: int) -> Tensor:
    past, text = KVMixCache(model), ids(2, sum(chunks))
    return torch.cat([model(part, past_key_values=past).logits for part in text.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon", "gpt_oss"])
def test_rotated_values_that_are_not_quantized_give_the_originals_logits(name: str) -> None:
    model = zoo(name)
    twin = applied(model, plan=rotated(unquantized(plan_of(name))))
    expected = model(ids(2, 131)).logits
    torch.testing.assert_close(read(twin, 100, 1, 30), expected, atol=2e-4, rtol=1e-3)


def test_a_plan_of_fisher_rotates_what_it_quantizes_and_the_published_ones_nothing() -> None:
    options = {"calibration": ids(2, 128), "sinks": SINKS, "recent": RECENT}
    assert all(site.values_rotated == site.value.is_quantized for site in quantized().kvmix_plan.sites)
    assert any(site.values_rotated for site in quantized().kvmix_plan.sites)
    for policy in ("uniform", "kvmix"):
        plan = applied(zoo("llama"), budget=3, policy=policy, **options).kvmix_plan
        assert not any(site.values_rotated for site in plan.sites)
    assert not any(site.values_rotated for site in unquantized(quantized().kvmix_plan).sites)


def test_a_file_says_it_and_one_of_before_says_no(tmp_path) -> None:
    plan, file = quantized().kvmix_plan, tmp_path / "plan.json"
    plan.save(file)
    assert Plan.load(file) == plan
    text = file.read_text().replace(f'"version": {VERSION}', '"version": 5').replace(', "values_rotated": true', "")
    file.write_text(text)
    before = Plan.load(file)
    assert before == replace(plan, sites=tuple(replace(site, values_rotated=False) for site in plan.sites))
    file.write_text(plan.as_json().replace('"values_rotated": true', '"values_rotated": 1', 1))
    with pytest.raises(PlanError, match="values_rotated"):
        Plan.load(file)
