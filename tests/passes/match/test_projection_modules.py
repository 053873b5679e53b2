"""K/V projections that are not nn.Linear: quantized weights, kernels of another package, low-rank adapters."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

import kvmix_compile
from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.one_capture import analyzed, applied, zoo

CALIBRATION = torch.randint(3, 128, (2, 96), generator=torch.Generator().manual_seed(0))
PROMPT = torch.randint(3, 128, (2, 90), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Dequantizing(nn.Module):
    """Weights of 8 bits and a scale for each output, made floats in forward, as for GGUF and torchao. No parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.codes * self.scale)


@torch.library.custom_op("kvmix_tests::int8_linear", mutates_args=())
def int8_linear(hidden: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return F.linear(hidden, codes * scale)


@int8_linear.register_fake
def _(hidden: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return hidden.new_empty(*hidden.shape[:-1], codes.shape[0])


# As bitsandbytes' and torchao's operators: gradients of activations, none of weights.
int8_linear.register_autograd(
    lambda ctx, gradient: (gradient @ (ctx.saved_tensors[0] * ctx.saved_tensors[1]), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
)


class Kernel(Dequantizing):
    """The same with an operator that nobody knows, as in bitsandbytes."""

    def forward(self, hidden: Tensor) -> Tensor:
        return int8_linear(hidden, self.codes, self.scale)


class Adapted(nn.Module):
    """A frozen linear map and a low-rank adapter of it, as peft's; or with the adapter merged for the time being."""

    def __init__(self, linear: nn.Linear, merged: bool = False, rank: int = 4) -> None:
        super().__init__()
        self.base, self.merged = linear, merged
        self.dropout = nn.Dropout(0.1)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        for part in (self.down, self.up):
            nn.init.normal_(part.weight, std=0.15, generator=torch.Generator().manual_seed(0))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.merged:
            return F.linear(hidden, self.base.weight + 2 * self.up.weight @ self.down.weight)
        return self.base(hidden) + 2 * self.up(self.down(self.dropout(hidden)))


MODULES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "dequantized": Dequantizing,
    "an operator of its own": Kernel,
    "adapted": Adapted,
    "adapted and merged": lambda linear: Adapted(linear, merged=True),
}


@cache
def with_projections(make: Callable[[nn.Linear], nn.Module]) -> PreTrainedModel:
    """Shared: tests leave it as they found it."""
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.k_proj = make(layer.self_attn.k_proj)
        layer.self_attn.v_proj = make(layer.self_attn.v_proj)
    return model.eval()


@pytest.mark.parametrize("name", MODULES)
def test_keys_and_values_of_any_projection_are_measured_and_compressed(name: str) -> None:
    model = with_projections(MODULES[name])
    importance = analyzed(model, calibration=CALIBRATION, sinks=4, recent=32)
    plain = analyzed(zoo("llama"), calibration=CALIBRATION, sinks=4, recent=32)
    for site, other in zip(importance.sites, plain.sites, strict=True):
        for measured, of_linear in (
            (site.key_sensitivity, other.key_sensitivity), (site.value_sensitivity, other.value_sensitivity)
        ):  # fmt: skip
            assert measured.keys() == of_linear.keys()
            assert all(0 <= loss < float("inf") for loss in measured.values()) and max(measured.values()) > 0
    lossless = applied(model, plan=importance.allocate(budget=16))
    assert torch.equal(lossless.generate(PROMPT, **GREEDY), model.generate(PROMPT, **GREEDY))
    low = applied(model, plan=importance.allocate(budget=2.3), verify=False)
    assert low.generate(PROMPT, **GREEDY).shape == (2, 96)


@pytest.mark.parametrize("name", ["dequantized", "adapted", "adapted and merged"])
def test_the_papers_policy_finds_the_linear_map(name: str) -> None:
    importance = analyzed(with_projections(MODULES[name]), calibration=CALIBRATION, sinks=4, recent=32)
    assert importance.allocate(budget=2.3, policy="kvmix").policy == "kvmix"


def test_the_papers_policy_says_where_it_finds_none() -> None:
    importance = analyzed(with_projections(Kernel), calibration=CALIBRATION, sinks=4, recent=32)
    with pytest.raises(kvmix_compile.KVMixError, match=r"no linear map.*policy='fisher'"):
        importance.allocate(budget=2.3, policy="kvmix")
