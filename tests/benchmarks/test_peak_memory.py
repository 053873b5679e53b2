"""A step of decoding allocates nothing of the size of what the cache would be unpacked."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import StaticCache

import kvmix_compile
from kvmix_compile import KVMixCache
from kvmix_compile.backend import packed_cache
from kvmix_compile.kernels.cpu.library import library
from kvmix_compile.models_zoo import plain
from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.cache_argument import with_cache
from tests.helpers.toy_llama import RECENT, SINKS, ids

pytestmark = pytest.mark.skipif(library() is None, reason="without a C++ compiler attention unpacks its whole past")

# One layer whose keys are large, and nothing else is. After a few steps more the cache grows.
HEADS, HEAD_DIM, TOKENS, STEPS = 4, 64, 4110, 42
UNPACKED = TOKENS * HEADS * HEAD_DIM * 4  # bytes of its keys in float32


@cache
def compiled() -> nn.Module:
    original = plain.hand_written(layers=1, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM)
    return kvmix_compile.apply(original, budget=2.3, calibration=ids(2, 128), sinks=SINKS, recent=RECENT)


def holding(tokens: int) -> KVMixCache:
    """A cache that holds so many tokens, all of them zeros."""
    past = KVMixCache(compiled())
    past.begin(1, tokens)
    past.advance(tokens, torch.zeros(1, dtype=torch.int64))
    return past


def largest_allocation(run: Callable[[], Any]) -> int:
    """Bytes of the largest tensor that PyTorch makes meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return max(event.self_cpu_memory_usage for event in profiler.events())


def test_the_measure_sees_what_is_made() -> None:
    assert largest_allocation(lambda: torch.ones(UNPACKED // 4)) >= UNPACKED


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_step_makes_nothing_of_the_unpacked_size(tokens: int) -> None:
    """Steps that pack a block among them, and one for which the cache grows, by a copy of what is packed."""
    past, found, grown = holding(TOKENS), [], []
    for _ in range(STEPS // tokens):
        room, text = past.states[0].blocks, ids(1, tokens)
        made = largest_allocation(lambda text=text: compiled()(text, **with_cache(past)))
        (found if past.states[0].blocks == room else grown).append(made)
    assert max(found) < UNPACKED / 20
    assert len(grown) == 1 and grown[0] <= past.states[0].packed_k.nbytes < UNPACKED / 5


CHILD = """
import json, resource, torch, kvmix_compile
from kvmix_compile.models_zoo import plain
HEADS, HEAD_DIM, TOKENS = {heads}, {head_dim}, {tokens}
ids = torch.randint(3, 128, (2, 128))
model = plain.hand_written(layers=1, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM)
model = kvmix_compile.apply(model, budget=2.3, calibration=ids, sinks=4, recent=32)
peaks = []
for tokens in (100, TOKENS):
    past = kvmix_compile.KVMixCache(model)
    past.begin(1, tokens)
    past.advance(tokens, torch.zeros(1, dtype=torch.int64))
    for tensor in past.tensors():
        tensor.zero_()  # every page of it is there
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    for token in range(33):
        model(ids[:1, token:token + 1], cache=past)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere peaks are counted in other units")
def test_no_more_memory_is_resident_either() -> None:
    """What C++ needs besides tensors: seen from outside, in a process of its own."""
    tokens = 30 * TOKENS
    code = CHILD.format(heads=HEADS, head_dim=HEAD_DIM, tokens=tokens)
    output = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    _, _, before, after = json.loads(output.stdout.splitlines()[-1])
    assert after - before < tokens * HEADS * HEAD_DIM * 4 / 10


def test_a_step_through_the_backend_makes_nothing_of_the_unpacked_size() -> None:
    """The first packs what was prompted elsewhere, one site after the other, and gives its storage back."""
    slots, model = 3000, tiny("llama", num_hidden_layers=1, max_position_embeddings=4096)
    unpacked = slots * 2 * 32 * 4
    plan = kvmix_compile.apply(model, budget=2.3, calibration=ids(2, 128), sinks=SINKS, recent=RECENT).kvmix_plan
    torch._dynamo.reset()
    step = torch.compile(model, backend="kvmix", options={"plan": plan, "backend": "eager"})
    made: list[int] = []
    with torch.no_grad():
        for _ in range(2):  # Dynamo's own work is over when the second cache comes
            past = StaticCache(model.config, max_cache_len=slots)
            model(ids(1, slots - 40), **with_cache(past))
            made = [largest_allocation(lambda past=past: step(ids(1, 1), **with_cache(past))) for _ in range(36)]
    first, *later = made
    packed = packed_cache(past)
    assert packed is not None and packed.nbytes < unpacked / 2
    assert first <= unpacked and max(later) < unpacked / 20
    assert past.layers[0].keys.untyped_storage().nbytes() < unpacked / 50
