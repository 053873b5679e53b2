"""Toy models compiled with backend="kvmix", and the caches that they read."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from kvmix_compile import KVMixCache, Plan
from kvmix_compile.backend import packed_cache
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.allocate.plan import SitePlan
from kvmix_compile.passes.match.sites import find_sites
from tests.helpers.cache_argument import with_cache
from tests.helpers.one_capture import captured_once

LOSSLESS = Precision(16)
SINKS, RECENT = 4, 32
SLOTS = 256


def ids(tokens: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padded(tokens: int) -> tuple[Tensor, Tensor]:
    """Two rows, the first with padding that leads it, and their mask."""
    mask = torch.ones(2, tokens, dtype=torch.int64)
    mask[0, :7] = 0
    return ids(tokens), mask


def fresh(name: str) -> PreTrainedModel:
    """To be compiled in place. Llama has one layer: what is tested on it is not about layers, and half is compiled."""
    return tiny(name, **{"num_hidden_layers": 1} if name == "llama" else {})


@cache
def original(name: str) -> PreTrainedModel:
    """The same for all tests."""
    return fresh(name)


@cache
def plan_for(name: str, key: Precision = LOSSLESS, value: Precision = LOSSLESS) -> Plan:
    sites = find_sites(captured_once(original(name))).matched
    planned = tuple(SitePlan(site.layer, site.shape, key, value) for site in sites)
    return Plan(planned, "by hand", "", SINKS, RECENT)


@cache
def low(name: str) -> Plan:
    """Keys with important channels, the even ones, and rotated values of 2 bits."""
    key, tiers = Precision(2, 32, 4, important_bits=(4, 3)), "3120" * 8
    sites = plan_for(name, value=Precision(2, 32, 4)).sites
    of_heads = [(tiers,) * site.kv_heads for site in sites]
    important = tuple(
        replace(site, key=key, channel_tiers=of_head, values_rotated=True)
        for site, of_head in zip(sites, of_heads, strict=True)
    )
    return replace(plan_for(name), sites=important)


def compiled(name: str, plan: Plan | None = None, **options: Any) -> Any:
    chosen = {"plan": plan or plan_for(name), "backend": "eager", **options}
    return torch.compile(original(name), backend="kvmix", options=chosen)


@cache
def step(*, quantized: bool) -> Any:
    """Of Llama, at `low` or at 16 bits. Compiled once for all tests of a file, unless Dynamo is reset in between."""
    return compiled("llama", low("llama") if quantized else None)


def static_cache(name: str, slots: int = SLOTS) -> StaticCache:
    return StaticCache(original(name).config, max_cache_len=slots)


def logits(model: Any, past: Any, text: Tensor, *chunks: int, **options: Any) -> Tensor:
    """Of the text read in chunks of these sizes, the rest token by token."""
    sizes = [*chunks, *[1] * (text.shape[1] - sum(chunks))]
    found = [model(input_ids=part, **with_cache(past), **options).logits for part in text.split(sizes, dim=1)]
    return torch.cat(found, dim=1)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-3 * expected.std())


def held(past: StaticCache) -> KVMixCache:
    found = packed_cache(past)
    assert found is not None
    return found
