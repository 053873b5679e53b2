"""Weights: what makes a model that cannot be compiled is named, and what only looks like it is let through."""

import pytest
import torch
from torch import nn

import kvmix_compile
from kvmix_compile.errors import KVMixError
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.weights import check_weights


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_no_number_is_named(name: str, dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    with torch.no_grad():
        model.get_parameter(name)[7, 3] = torch.nan
    for call in (kvmix_compile.apply, kvmix_compile.analyze):
        with pytest.raises(KVMixError, match=f"^the parameter {name} has elements that are NaN"):
            call(model)
    assert name in str(kvmix_compile.diagnose(model).problem)


@pytest.mark.parametrize("elements", [[1e38] * 4, [3e38, 3e38, -3e38], [torch.inf, -torch.inf, 0.0], []])
def test_large_and_infinite_weights_are_not_taken_for_it(elements: list[float]) -> None:
    model = nn.Module()
    model.bias = nn.Parameter(torch.tensor(elements))
    model.small = nn.Parameter(torch.full((100,), 6e4).half())
    model.counts = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    check_weights(model)


def test_weights_made_in_inference_mode_are_refused_by_name() -> None:
    with torch.inference_mode():
        model = tiny("llama")
    with pytest.raises(KVMixError, match=r"embed_tokens.weight was made in torch.inference_mode"):
        kvmix_compile.apply(model)
