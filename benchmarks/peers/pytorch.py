"""PyTorch's own: scaled_dot_product_attention by each of its backends, and FlexAttention's kernel for decoding."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex

from benchmarks.peers.contender import Contender, Contenders

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Contenders:
    """By each backend, with each query head by itself and with a group as queries of one head."""

    def attention(backend: SDPBackend, queries: Tensor) -> Contender:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(queries, k, v, enable_gqa=True)

        return Contender(run, lambda: (k, v))

    as_queries = q.view(k.shape[0], k.shape[1], -1, k.shape[3])
    layouts = {"": q, "_AS_QUERIES": as_queries}
    return {
        backend.name + layout: attention(backend, queries)
        for backend in BACKENDS
        for layout, queries in layouts.items()
    }


def flex_attention(q: Tensor, k: Tensor, v: Tensor) -> Contenders:
    """FlexAttention compiled, by its kernel that splits the tokens of few queries (flex decoding), and no other.

    It is for groups of a power of two of query heads, and is refused where it cannot be had.
    """
    compiled = _compiled_flex(tuple(q.shape), tuple(k.shape), q.dtype)
    options = flex.FlexKernelOptions(BACKEND="TRITON_DECODE")
    return {
        "flex-decoding": Contender(lambda: compiled(q, k, v, enable_gqa=True, kernel_options=options), lambda: (k, v))
    }


@lru_cache(maxsize=1)
def _compiled_flex(queries: tuple[int, ...], keys: tuple[int, ...], dtype: torch.dtype) -> Callable[..., Any]:
    """Compiled for one shape, tuned; what was compiled for others is dropped, or Dynamo would refuse the ninth."""
    torch.compiler.reset()
    return torch.compile(flex.flex_attention, dynamic=False, fullgraph=True, mode="max-autotune-no-cudagraphs")
