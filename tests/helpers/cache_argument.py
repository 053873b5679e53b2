"""The argument that transformers' own models take a cache as: its name has changed (passes/capture/signature.py)."""

from typing import Any

from transformers import LlamaForCausalLM

from kvmix_compile.passes.capture.signature import cache_name

CACHE_ARGUMENT = cache_name(LlamaForCausalLM.forward)


def with_cache(cache: Any) -> dict[str, Any]:
    """`model(ids, **with_cache(cache))`."""
    return {CACHE_ARGUMENT: cache}
