"""FlashInfer's attention of a decoded token over a cache in pages: on CUDA cores, on tensor cores, and TensorRT-LLM's
kernels.
"""

import torch
from torch import Tensor

from benchmarks.peers.contender import Contender, Contenders

# Tokens of a page, as in FlashInfer's own examples.
PAGE = 16
# What its documentation recommends.
WORKSPACE_BYTES = 128 * 2**20


def flashinfer(q: Tensor, k: Tensor, v: Tensor) -> Contenders:
    """All three; raises ImportError where the package is not installed.

    The memory of keys and values is read as pages, `[pages, PAGE, heads, head_dim]`, for TensorRT-LLM's kernels
    `[pages, heads, PAGE, head_dim]`: other random numbers than SDPA's, which take no room.
    """
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper  # type: ignore[import-not-found]
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache  # type: ignore[import-not-found]

    rows, heads, tokens, head_dim = k.shape
    query_heads, queries = q.shape[1], q.view(rows, q.shape[1], head_dim)
    table = page_table(k)
    pages = [cache.flatten()[: rows * tokens // PAGE * PAGE * heads * head_dim] for cache in (k, v)]
    token_major = [memory.view(-1, PAGE, heads, head_dim) for memory in pages]
    head_major = [memory.view(-1, heads, PAGE, head_dim) for memory in pages]

    def wrapped(tensor_cores: bool) -> Contender:
        wrapper = BatchDecodeWithPagedKVCacheWrapper(_workspace(q), "NHD", use_tensor_cores=tensor_cores)
        each = table.shape[1]
        firsts = torch.arange(0, rows * each + 1, each, dtype=torch.int32, device=q.device)
        last = torch.full((rows,), tokens - (each - 1) * PAGE, dtype=torch.int32, device=q.device)
        # Once a step, for all layers: it is not timed.
        wrapper.plan(
            *(firsts, table.flatten(), last, query_heads, heads, head_dim, PAGE),
            q_data_type=q.dtype,
            kv_data_type=k.dtype,
        )
        cache = tuple(token_major)
        return Contender(lambda: wrapper.run(queries, cache), lambda: _held(token_major, table, tokens))

    def trtllm() -> Contender:
        workspace, cache = _workspace(q), tuple(head_major)
        lengths = torch.full((rows,), tokens, dtype=torch.int32, device=q.device)
        return Contender(
            lambda: trtllm_batch_decode_with_kv_cache(
                queries, cache, workspace, table, lengths, tokens, bmm1_scale=head_dim**-0.5, kv_layout="HND"
            ),
            lambda: _held([memory.transpose(1, 2) for memory in head_major], table, tokens),
        )

    return {
        "flashinfer": wrapped(tensor_cores=False),
        "flashinfer-tensor-cores": wrapped(tensor_cores=True),
        "flashinfer-trtllm": trtllm(),
    }


def page_table(k: Tensor) -> Tensor:
    """int32 `[rows, pages of a row]`: where its pages lie in as much memory as keys `[rows, heads, tokens, head_dim]`
    take. A row's last page may have one token only, and there is no room for all of those: they are pages of others.
    """
    rows, _, tokens, _ = k.shape
    whole, available = tokens // PAGE, rows * tokens // PAGE
    if not available:
        raise ValueError(f"{rows * tokens} tokens fill no page of {PAGE}")
    table = torch.arange(rows * whole, device=k.device).view(rows, whole)
    if tokens % PAGE:
        table = torch.cat([table, (rows * whole + torch.arange(rows, device=k.device)[:, None]) % available], 1)
    return table.to(torch.int32)


def _held(pages: list[Tensor], table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """What lies in these pages, `[pages, PAGE, heads, head_dim]`, as `[rows, heads, tokens, head_dim]`."""
    keys, values = (memory[table].flatten(1, 2)[:, :tokens].transpose(1, 2) for memory in pages)
    return keys, values


def _workspace(q: Tensor) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
