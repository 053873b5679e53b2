"""Which kernel runs on a CUDA device: Triton's, PyTorch's own flash attention, or the reference."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.errors import KVMixError

# A chunk this long may be a prompt on an empty state, which PyTorch's flash attention serves best. To know, the host
# waits for the lengths; with shorter chunks it never waits, and a step can be captured in a CUDA graph.
PROMPT_TOKENS = 128

# Accumulators of wider heads do not fit a program's registers.
WIDEST_HEAD = 256


def append_on_cuda(*arguments: Any) -> None:
    """As reference.append."""
    k, v, lengths, starts, *state = arguments[:10]
    if not _triton_serves(k, v):
        reference.append(*arguments)
        return
    from kvmix_compile.kernels.gpu import append as triton_append

    _check_contiguous(lengths, starts, *state)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(k.device):
        triton_append.append(*arguments)


def attend_on_cuda(*arguments: Any) -> Tensor:
    """As reference.attend."""
    q, k, v, lengths, starts, *state = arguments[:11]
    weighting = arguments[-1]
    flash = weighting.is_softmax and not weighting.is_limited and k.shape[3] == v.shape[3]
    is_prompt = flash and q.shape[2] >= PROMPT_TOKENS and not bool(lengths.any())
    if is_prompt or not _triton_serves(k, v):
        return reference.attend(*arguments)
    from kvmix_compile.kernels.gpu import attend as triton_attend

    _check_contiguous(lengths, starts, *state)
    with torch.cuda.device(q.device):
        return triton_attend.attend(*arguments)


def _triton_serves(k: Tensor, v: Tensor) -> bool:
    return _has_triton() and max(k.shape[3], v.shape[3]) <= WIDEST_HEAD


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _check_contiguous(*tensors: Tensor) -> None:
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise KVMixError("lengths, starts and a state's tensors must be contiguous: call .contiguous() on them")
