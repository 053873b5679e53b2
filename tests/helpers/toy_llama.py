"""A toy Llama and its compiled twins, made once: what many tests look at from different sides."""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvmix_compile import Plan
from tests.helpers.one_capture import applied, zoo

# Few, so that short texts are stored in all three ways: as sinks, packed, and in the recent window.
SINKS, RECENT = 4, 32


def ids(rows: int, tokens: int, seed: int = 1) -> Tensor:
    """Random token ids of the toy models' vocabulary, none of them a special token."""
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def unquantized(plan: Plan) -> Plan:
    """The plan with everything at 16 bits."""
    return replace(plan, sites=tuple(site.unquantized() for site in plan.sites))


@cache
def original() -> PreTrainedModel:
    return zoo("llama")


@cache
def quantized_twin(name: str) -> PreTrainedModel:
    """Of a model of the zoo, at 2.3 bits."""
    return applied(zoo(name), budget=2.3, calibration=ids(2, 128), sinks=SINKS, recent=RECENT)


@cache
def lossless_twin(name: str) -> PreTrainedModel:
    """Of a model of the zoo, with a KVMixCache that quantizes nothing."""
    return applied(zoo(name), plan=unquantized(quantized_twin(name).kvmix_plan), verify=False)


def quantized() -> PreTrainedModel:
    """At 2.3 bits."""
    return quantized_twin("llama")


def lossless() -> PreTrainedModel:
    """With a KVMixCache that quantizes nothing."""
    return lossless_twin("llama")
