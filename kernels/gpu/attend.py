"""Split-KV flash decoding over a quantized state. What it computes: reference.py's attend.

One program takes a row, a head of keys and values, a tile of its queries (all the query heads that share it, for one
or more tokens) and one split of the row's tokens, multiplies on the tensor cores and keeps a running softmax; a second
kernel joins the splits by their log-sum-exp. Which tokens a split takes is decided on the device, from the row's own
length: the host reads nothing. There are two such programs: attend_codes.py multiplies codes as they are, where there
are few queries in bfloat16; attend_elements.py makes the elements first, and serves all else.
"""

# What a kernel is given has no Python type: pointers, numbers and tensors of Triton's own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.gpu.attend_codes import attend_codes_kernel
from kvmix_compile.kernels.gpu.attend_elements import attend_elements_kernel
from kvmix_compile.kernels.gpu.code_rows import rows_of_keys, rows_of_values
from kvmix_compile.kernels.gpu.pages import Places
from kvmix_compile.kernels.gpu.unpack import BlockFormat
from kvmix_compile.kernels.weighting import Weighting

# Threads of a warp.
WARP = 32

# A tensor core multiplies at least this many rows of queries.
SMALLEST_QUERY_TILE = 16
LARGEST_QUERY_TILE = 64

# Tiles in flight: the packed bytes of the next tile are read while one is worked on.
STAGES = 2

# All that a thread may have: left to itself the assembler spills a few to fit more programs on a multiprocessor.
REGISTERS = 255

# Programs that run at once on each multiprocessor, as registers allow; with fewer in all, rows are split.
PROGRAMS_PER_MULTIPROCESSOR = 4
MOST_SPLITS = 64

# Of these a program is one warp, whose accumulators must fit beside its queries.
CODE_PROGRAMS_PER_MULTIPROCESSOR = 8
MOST_SPLITS_OF_CODES = 128
WIDEST_OF_CODES = 128


@triton.jit
def combine_kernel(
    partial,  # float32 [splits, queries, value_dim]
    log_sums,  # float32 [splits, queries]
    output,  # [queries, value_dim]
    queries,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Join the splits of one query, some of its channels."""
    query = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, PADDED_SPLITS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    log_sum = tl.load(log_sums + split * queries + query, mask=split < SPLITS, other=float("-inf"))
    highest = tl.max(log_sum, 0)
    weight = tl.exp2(log_sum - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight, 0)
    attended = tl.load(
        partial + ((split * queries + query) * DIM)[:, None] + channel[None, :],
        mask=(log_sum > float("-inf"))[:, None] & (channel < DIM)[None, :],
        other=0.0,
    )
    mean = tl.sum(attended * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(output + query * DIM + channel, mean.to(output.dtype.element_ty), mask=channel < DIM)


@dataclass(frozen=True)
class Launch:
    """How a call is cut into programs."""

    query_tile: int
    query_tiles: int
    splits: int
    blocks: int  # packed blocks of a tile
    warps: int = 4
    from_codes: bool = False

    @classmethod
    def choose(
        cls,
        queries: int,
        pairs: int,
        most_tokens: int,
        widest: int,
        itemsize: int,
        multiprocessors: int,
        has_codes: bool = False,
    ) -> Launch:
        """From shapes alone, so that a captured graph stays right as rows grow.

        queries: query heads of a group times tokens; pairs: rows times heads of keys and values; most_tokens: what a
        row can hold; widest: the channels of a key or of a value, the more of them; itemsize: bytes of an element;
        has_codes: whether codes can be multiplied as they are.
        """
        largest = LARGEST_QUERY_TILE if widest <= 128 else LARGEST_QUERY_TILE // 2
        query_tile = min(max(triton.next_power_of_2(queries), SMALLEST_QUERY_TILE), largest)
        query_tiles = triton.cdiv(queries, query_tile)
        from_codes = has_codes and query_tile == SMALLEST_QUERY_TILE and widest <= WIDEST_OF_CODES
        programs, most_splits = PROGRAMS_PER_MULTIPROCESSOR, MOST_SPLITS
        padded = triton.next_power_of_2(widest)
        # Where more is padded, or elements are float32, the masks take the registers of a second block.
        blocks = 2 if widest == padded or (itemsize == 2 and 4 * widest >= 3 * padded) else 1
        if from_codes:
            blocks, warps = 1, 1
            programs, most_splits = CODE_PROGRAMS_PER_MULTIPROCESSOR, MOST_SPLITS_OF_CODES
        elif widest > 128 or query_tile == LARGEST_QUERY_TILE:
            warps = 8
        else:
            # As few as have the registers: each works out and moves what all of them need.
            warps = 2 if widest <= 64 and query_tile == SMALLEST_QUERY_TILE and itemsize == 2 else 4
        wanted = triton.cdiv(programs * multiprocessors, pairs * query_tiles)
        tiles = triton.cdiv(most_tokens, blocks * BLOCK_TOKENS)
        splits = max(1, min(wanted, tiles, most_splits))
        # A power of two, so that few variants are compiled as a state grows.
        return cls(query_tile, query_tiles, triton.next_power_of_2(splits), blocks, warps, from_codes)

    @property
    def kernel(self) -> Any:
        return attend_codes_kernel if self.from_codes else attend_elements_kernel

    def formats(self, storage: Storage, key_dim: int, value_dim: int, itemsize: int) -> dict[str, Any]:
        """How blocks are stored, as the kernel's constants."""
        if self.from_codes:
            return {
                "KEYS": rows_of_keys(storage.key, key_dim, itemsize),
                "VALUES": rows_of_values(storage.value, value_dim),
                "KEY_GROUP": storage.key.group,
                "KEY_DIM": key_dim,
                "VALUE_DIM": value_dim,
                "KEY_BYTES": storage.key.block_bytes(key_dim, itemsize),
                "VALUE_BYTES": storage.value.block_bytes(value_dim, itemsize),
            }
        return {
            "KEYS": BlockFormat.parts(storage.key, key_dim, itemsize),
            "VALUE": BlockFormat.parts(storage.value, value_dim, itemsize)[0],
            "BLOCKS": self.blocks,
            "THREADS": WARP * self.warps,
        }


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    # Triton's interpreter runs on the CPU; one multiprocessor keeps it from splitting what it works off in turn.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def has_codes(storage: Storage, key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether codes can be multiplied as they are."""
    if dtype != torch.bfloat16 or (storage.key.group < BLOCK_TOKENS and key_dim < WIDEST_OF_CODES):
        # The scales of few tokens go into the queries again for each few of them, which only pays for wide heads.
        return False
    return all((rows_of_keys(storage.key, key_dim, dtype.itemsize), rows_of_values(storage.value, value_dim)))


@torch.no_grad()
def attend(
    query: Tensor,
    chunk: Chunk,
    state: SiteState | Pages,
    storage: Storage,
    weighting: Weighting,
    launch: Launch | None = None,
) -> Tensor:
    """As reference.attend, for contiguous state tensors, or as paged.attend; never waits for the device.

    So it cannot refuse pages that are missing: what is seen must lie in one.

    launch: how the work is cut; chosen from the shapes where it is not given.
    """
    key, value = chunk.key, chunk.value
    rows, query_heads, tokens, key_dim = query.shape
    heads, value_dim = value.shape[1], value.shape[3]
    shared, itemsize = query_heads // heads, query.element_size()
    output = query.new_empty(rows, query_heads, tokens, value_dim)
    places = Places.of(state)
    if output.numel() == 0:
        return output
    if launch is None:
        most_tokens = places.most_tokens + tokens
        widest = max(key_dim, value_dim)
        processors = _multiprocessors(query.device)
        codes = has_codes(storage, key_dim, value_dim, query.dtype)
        launch = Launch.choose(shared * tokens, rows * heads, most_tokens, widest, itemsize, processors, codes)
    splits = launch.splits
    queries = rows * query_heads * tokens
    partial = output if splits == 1 else query.new_empty(splits, queries, value_dim, dtype=torch.float32)
    log_sums = query.new_empty(splits, queries, dtype=torch.float32) if splits > 1 else partial
    launch.kernel[(launch.query_tiles, rows * heads, splits)](
        *(query, key, value, chunk.lengths, chunk.starts, *places.tensors, partial, log_sums),
        *(weighting.sink_logits, weighting.slopes),
        *(*query.stride(), *key.stride(), *value.stride()),
        *(
            tokens,
            places.capacity,
            weighting.scale,
            weighting.softcap,
            weighting.sliding_window,
            weighting.attention_chunk,
        ),
        HEADS=heads,
        SHARED=shared,
        **launch.formats(storage, key_dim, value_dim, itemsize),
        RECENT=storage.recent,
        **places.arguments,
        SOFTCAP=weighting.softcap != 0,
        SLIDING=weighting.sliding_window != 0,
        CHUNKED=weighting.attention_chunk != 0,
        SPLITS=splits,
        QUERIES=launch.query_tile,
        num_warps=launch.warps,
        num_stages=STAGES,
        maxnreg=REGISTERS,
    )
    if splits > 1:
        channels = min(triton.next_power_of_2(value_dim), 64)
        combine_kernel[(queries, triton.cdiv(value_dim, channels))](
            partial,
            log_sums,
            output,
            queries,
            SPLITS=splits,
            PADDED_SPLITS=triton.next_power_of_2(splits),
            DIM=value_dim,
            CHANNELS=channels,
        )
    return output
