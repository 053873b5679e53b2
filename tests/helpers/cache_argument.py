"""The argument that transformers' own models take a cache as: its name has changed (passes/signature.py)."""

from typing import Any

from transformers import LlamaForCausalLM

from kvmix_compile.passes.signature import cache_name

CACHE_ARGUMENT = cache_name(LlamaForCausalLM.forward)


def with_cache(cache: Any) -> dict[str, Any]:
    """`model(ids, **with_cache(cache))`."""
    return {CACHE_ARGUMENT: cache}
