"""Which kernel runs on a CUDA device: Triton's, PyTorch's own flash attention, or the reference."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.weighting import Weighting

# A chunk this long may be a prompt on an empty state, which PyTorch's flash attention serves best. To know, the host
# waits for the lengths; with shorter chunks it never waits, and a step can be captured in a CUDA graph.
PROMPT_TOKENS = 128

# Accumulators of wider heads do not fit a program's registers.
WIDEST_HEAD = 256


def append_on_cuda(chunk: Chunk, state: SiteState, storage: Storage) -> None:
    """As reference.append."""
    if not _triton_serves(chunk):
        reference.append(chunk, state, storage)
        return
    from kvmix_compile.kernels.gpu import append as triton_append

    _check_contiguous(chunk, state)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(chunk.key.device):
        triton_append.append(chunk, state, storage)


def attend_on_cuda(query: Tensor, chunk: Chunk, state: SiteState, storage: Storage, weighting: Weighting) -> Tensor:
    """As reference.attend."""
    same_dim = chunk.key.shape[3] == chunk.value.shape[3]
    flash = weighting.is_softmax and not weighting.is_limited and same_dim
    is_prompt = flash and query.shape[2] >= PROMPT_TOKENS and not bool(chunk.lengths.any())
    if is_prompt or not _triton_serves(chunk) or chunk.values_are_keys(query):
        return reference.attend(query, chunk, state, storage, weighting)
    from kvmix_compile.kernels.gpu import attend as triton_attend

    _check_contiguous(chunk, state)
    with torch.cuda.device(query.device):
        return triton_attend.attend(query, chunk, state, storage, weighting)


def _triton_serves(chunk: Chunk) -> bool:
    return _has_triton() and max(chunk.key.shape[3], chunk.value.shape[3]) <= WIDEST_HEAD


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _check_contiguous(chunk: Chunk, state: SiteState) -> None:
    if not all(map(Tensor.is_contiguous, (chunk.lengths, chunk.starts, *state.tensors()))):
        raise KVMixError("lengths, starts and a state's tensors must be contiguous: call .contiguous() on them")
