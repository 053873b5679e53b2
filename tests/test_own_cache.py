"""The model's own cache: a compressed one may not be larger, and the report says where it might be smaller."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvmix_compile.errors import BudgetError
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.rewrite.original import LONGER_TEXT, cache_bytes
from tests.helpers.one_capture import applied

IDS = torch.arange(3, 3 + LONGER_TEXT)[None]
FLOAT32 = 4


def held(model: nn.Module) -> float | None:
    return cache_bytes(model, IDS)


def test_it_is_seen_what_the_models_own_cache_holds_of_a_token() -> None:
    layers, kv_heads, head_dim = 2, 2, 32
    assert held(tiny("llama")) == layers * kv_heads * 2 * head_dim * FLOAT32
    assert held(tiny("mistral")) == layers * kv_heads * 2 * head_dim * FLOAT32
    latent, rotary = 64, 16
    assert held(tiny("deepseek_v3")) == layers * (latent + rotary) * FLOAT32


def test_of_a_state_that_does_not_grow_nothing_is_counted() -> None:
    one_layer_has_a_convolution = tiny("lfm2")
    assert held(one_layer_has_a_convolution) == 2 * 2 * 32 * FLOAT32


def test_a_model_without_a_cache_of_its_own_holds_nothing_to_compare_with() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids

    assert held(Plain()) is None


@pytest.fixture(scope="module")
def wide_latents() -> PreTrainedModel:
    """Two heads of 80 numbers each, made of a row of 112: too wide to be attended to in their place."""
    return tiny("deepseek_v3", num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=96)


def calibrated(model: PreTrainedModel, budget: float) -> PreTrainedModel:
    rows = torch.randint(3, 128, (1, 96), generator=torch.Generator().manual_seed(0))
    return applied(model, budget=budget, calibration=rows, sinks=4, recent=32, verify=False)


def test_what_would_take_more_than_the_models_own_cache_is_refused(wide_latents: PreTrainedModel) -> None:
    with pytest.raises(BudgetError, match=r"keeps 896 bytes a token in its own cache.*this plan 1280.*below 11\)"):
        calibrated(wide_latents, budget=16)


def test_where_more_numbers_are_quantized_than_it_holds_the_report_says_so(wide_latents: PreTrainedModel) -> None:
    report = calibrated(wide_latents, budget=2.3).kvmix_report
    assert report.own_cache_bytes == 896
    assert report.token_bytes < 1280 / 8
    (note,) = report.notes
    assert "1.4 times as many numbers" in note
    assert "in the model's own cache 896" in str(report)


def test_where_as_many_are_quantized_there_is_nothing_to_say() -> None:
    report = calibrated(tiny("llama"), budget=16).kvmix_report
    assert report.notes == ()
    assert report.token_bytes == report.own_cache_bytes == 1024
