"""Which kernel runs on a CUDA device: Triton's, PyTorch's own flash attention, or the reference."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from kvmix_compile.kernels import paged, reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.weighting import Weighting

# A chunk this long may be a prompt on an empty state, which PyTorch's flash attention serves best. To know, the host
# waits for the lengths; with shorter chunks it never waits, and a step can be captured in a CUDA graph.
PROMPT_TOKENS = 128

# Accumulators of wider heads do not fit a program's registers.
WIDEST_HEAD = 256


def append_on_cuda(chunk: Chunk, held: SiteState | Pages, storage: Storage) -> None:
    """As reference.append; or as paged.append, but for pages that are missing: what is packed must lie in one."""
    if not _triton_serves(chunk):
        if isinstance(held, Pages):
            return paged.append(chunk, held, storage)
        return reference.append(chunk, held, storage)
    from kvmix_compile.kernels.gpu import append as triton_append

    _check(chunk, held)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(chunk.key.device):
        return triton_append.append(chunk, held, storage)


def attend_on_cuda(
    query: Tensor, chunk: Chunk, held: SiteState | Pages, storage: Storage, weighting: Weighting
) -> Tensor:
    """As reference.attend; or as paged.attend, but for pages that are missing: what is seen must lie in one."""
    if _reference_serves(query, chunk, weighting):
        if isinstance(held, Pages):
            return paged.attend(query, chunk, held, storage, weighting)
        return reference.attend(query, chunk, held, storage, weighting)
    from kvmix_compile.kernels.gpu import attend as triton_attend

    _check(chunk, held)
    with torch.cuda.device(query.device):
        return triton_attend.attend(query, chunk, held, storage, weighting)


def _reference_serves(query: Tensor, chunk: Chunk, weighting: Weighting) -> bool:
    """Whether PyTorch's flash attention is best, or Triton's kernels do not know of what is asked."""
    same_dim = chunk.key.shape[3] == chunk.value.shape[3]
    flash = weighting.is_softmax and not weighting.is_limited and same_dim
    is_prompt = flash and query.shape[2] >= PROMPT_TOKENS and not bool(chunk.lengths.any())
    return is_prompt or not _triton_serves(chunk) or chunk.values_are_keys(query)


def _triton_serves(chunk: Chunk) -> bool:
    return _has_triton() and max(chunk.key.shape[3], chunk.value.shape[3]) <= WIDEST_HEAD


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _check(chunk: Chunk, held: SiteState | Pages) -> None:
    """Raise KVMixError where Triton's kernels cannot read what they are given."""
    if isinstance(held, Pages):
        _check_pages(chunk, held)
    else:
        _check_contiguous(chunk, held)


def _check_contiguous(chunk: Chunk, state: SiteState) -> None:
    if not all(map(Tensor.is_contiguous, (chunk.lengths, chunk.starts, *state.tensors()))):
        raise KVMixError("lengths, starts and a state's tensors must be contiguous: call .contiguous() on them")


def _check_pages(chunk: Chunk, pages: Pages) -> None:
    # There is Triton where there are pages to be checked.
    from kvmix_compile.kernels.gpu.pages import BLOCK_ALIGNMENT

    if not all(map(Tensor.is_contiguous, (chunk.lengths, chunk.starts))):
        raise KVMixError("lengths and starts must be contiguous: call .contiguous() on them")
    if any(tensor.stride()[-1] != 1 for tensor in pages.tensors()):
        raise KVMixError("the last dimension of tables and pools must be contiguous: lay out pools with channels last")
    if any(table.dtype != torch.int32 for table in (pages.raw, pages.packed)):
        raise KVMixError("tables of pages must be of int32: call .int() on them")
    for pool in (pages.packed_k, pages.packed_v):
        if any(number % BLOCK_ALIGNMENT for number in (pool.data_ptr(), *pool.stride()[:3])):
            raise KVMixError(
                f"packed blocks must begin at multiples of {BLOCK_ALIGNMENT} bytes: align the pool and its strides"
            )
