"""Split-KV flash decoding over a quantized state. What it computes: reference.py's attend.

One program takes a row, a head of keys and values, a tile of its queries (all the query heads that share it, for one
or more tokens) and one split of the row's tokens. It unpacks keys and values in registers, multiplies on the tensor
cores and keeps a running softmax; a second kernel joins the splits by their log-sum-exp. Which tokens a split takes is
decided on the device, from the row's own length: the host reads nothing.
"""

# What a kernel is given has no Python type: pointers, numbers and tensors of Triton's own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.gpu.unpack import BlockFormat, channels_in_order, part_of, unpack_keys, unpack_values
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

_TOKENS = tl.constexpr(BLOCK_TOKENS)
_LOG2_E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def attend_kernel(
    q,
    k,
    v,
    lengths,
    starts,
    sink_k,
    sink_v,
    packed_k,
    packed_v,
    recent_k,
    recent_v,
    output,  # [splits, B, Hq, M, value_dim], in q's dtype where there is one split, else float32
    log_sums,  # float32 [splits, B, Hq, M]: log2 of the sum of exponentials
    sink_logits,  # [Hq] or None
    slopes,  # [Hq] or None
    q_row,  # strides, in elements
    q_head,
    q_token,
    q_channel,
    k_row,
    k_head,
    k_token,
    k_channel,
    v_row,
    v_head,
    v_token,
    v_channel,
    tokens,  # M
    capacity,  # packed blocks
    scale,
    softcap,
    sliding_window,
    attention_chunk,
    HEADS: tl.constexpr,  # of keys and values
    SHARED: tl.constexpr,  # query heads of each
    KEYS: tl.constexpr,  # the formats of a block's parts
    VALUE: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    SLOTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLIDING: tl.constexpr,
    CHUNKED: tl.constexpr,
    SPLITS: tl.constexpr,
    QUERIES: tl.constexpr,  # rows of a tile of queries
    BLOCKS: tl.constexpr,  # packed blocks of a tile of tokens
    THREADS: tl.constexpr,
):
    """One tile of queries over one split of its tokens: values averaged, and what their weights sum to."""
    first_query = tl.program_id(0) * QUERIES
    row = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    split = tl.program_id(2)
    DTYPE: tl.constexpr = q.dtype.element_ty
    TILE: tl.constexpr = BLOCKS * _TOKENS
    length = tl.load(lengths + row).to(tl.int32)
    start = tl.load(starts + row).to(tl.int32)

    # The queries of one token follow each other, so that a tile spans few tokens.
    query = first_query + tl.arange(0, QUERIES)
    place = query // SHARED
    is_query = (place >= start) & (place < tokens)
    number = length - start + place
    earliest = _first_visible(number, sliding_window, attention_chunk, SLIDING, CHUNKED)
    value_channel, is_value_channel = channels_in_order(VALUE)
    query_head = head * SHARED + query % SHARED
    queries = _load_queries(q + row * q_row + query_head * q_head + place * q_token, q_channel, is_query, KEYS)

    # The past as stored, then what is not packed: sink, ring and the chunk up to the tile's last token.
    last_place = tl.minimum((first_query + QUERIES - 1) // SHARED, tokens - 1)
    first_number = length - start + tl.maximum(first_query // SHARED, start)
    first_visible = _first_visible(first_number, sliding_window, attention_chunk, SLIDING, CHUNKED)
    beyond = tl.maximum(length - SINKS - RECENT, 0)
    blocks = (beyond + _TOKENS - 1) // _TOKENS
    first_block = tl.minimum(tl.maximum(first_visible - SINKS, 0) // _TOKENS, blocks)
    in_sink = tl.minimum(length, SINKS)
    in_chunk = tl.maximum(last_place - start + 1, 0)
    skipped = tl.maximum(tl.minimum(first_visible, in_sink), first_visible - blocks * _TOKENS)
    skipped = tl.maximum(skipped, 0)
    unpacked = tl.maximum(length - blocks * _TOKENS + in_chunk - skipped, 0)
    packed_tiles = (blocks - first_block + BLOCKS - 1) // BLOCKS
    tiles = packed_tiles + (unpacked + TILE - 1) // TILE
    if last_place < start:
        tiles = 0
    per_split = (tiles + SPLITS - 1) // SPLITS
    begin = tl.minimum(split * per_split, tiles)
    end = tl.minimum(begin + per_split, tiles)

    scale_log2 = scale * _LOG2_E
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if sink_logits is not None and split == 0:
        highest = tl.load(sink_logits + query_head).to(tl.float32) * _LOG2_E
        total += 1.0
    slope = None if slopes is None else tl.load(slopes + query_head).to(tl.float32) * _LOG2_E
    attended = tl.zeros([QUERIES, VALUE.slices * VALUE.padded_width], tl.float32)
    place_in_tile = tl.arange(0, TILE)

    state_head = row * HEADS + head
    head_of_packed_k = packed_k + state_head * capacity * KEYS[0].block_bytes
    head_of_packed_v = packed_v + state_head * capacity * VALUE.block_bytes
    # Of a window only the last blocks may be kept; elsewhere each lies in its own place.
    ring = capacity if SLIDING or CHUNKED else None
    for tile in tl.range(begin, tl.minimum(end, packed_tiles)):
        block = first_block + tile * BLOCKS
        token = SINKS + block * _TOKENS + place_in_tile
        scores = tl.zeros([QUERIES, TILE], tl.float32)
        for part in tl.static_range(len(KEYS)):
            keys = unpack_keys(head_of_packed_k, ring, block, blocks, DTYPE, BLOCKS, part_of(KEYS, part), THREADS)
            scores = _multiply(queries[part], keys.trans(), scores)
        visible = is_query[:, None] & (token < SINKS + blocks * _TOKENS)[None, :]
        if SLIDING or CHUNKED:
            visible &= token[None, :] >= earliest[:, None]
        weights, highest, total, correction = _weigh(
            scores, visible, token[None, :] - number[:, None], highest, total, scale_log2, softcap, slope, SOFTCAP
        )
        values = unpack_values(head_of_packed_v, ring, block, blocks, DTYPE, BLOCKS, VALUE, THREADS)
        attended = _multiply(weights.to(DTYPE), values, attended * correction[:, None])

    head_of_sink_k = sink_k + state_head * SINKS * KEYS[0].head_dim
    head_of_sink_v = sink_v + state_head * SINKS * VALUE.head_dim
    head_of_recent_k = recent_k + state_head * SLOTS * KEYS[0].head_dim
    head_of_recent_v = recent_v + state_head * SLOTS * VALUE.head_dim
    # Few tiles: reading ahead would only take shared memory from the loop above.
    for tile in tl.range(tl.maximum(begin, packed_tiles), end, num_stages=1):
        index = skipped + (tile - packed_tiles) * TILE + place_in_tile
        token = tl.where(index < in_sink, index, index + blocks * _TOKENS)
        scores = tl.zeros([QUERIES, TILE], tl.float32)
        for part in tl.static_range(len(KEYS)):
            keys = _load_unpacked(
                head_of_sink_k,
                head_of_recent_k,
                k + row * k_row + head * k_head,
                k_token,
                k_channel,
                token,
                in_sink,
                length,
                start,
                in_chunk,
                SINKS,
                SLOTS,
                part_of(KEYS, part),
            )
            scores = _multiply(queries[part], keys.trans(), scores)
        visible = is_query[:, None] & (token[None, :] <= number[:, None])
        if SLIDING or CHUNKED:
            visible &= token[None, :] >= earliest[:, None]
        weights, highest, total, correction = _weigh(
            scores, visible, token[None, :] - number[:, None], highest, total, scale_log2, softcap, slope, SOFTCAP
        )
        values = _load_unpacked(
            head_of_sink_v,
            head_of_recent_v,
            v + row * v_row + head * v_head,
            v_token,
            v_channel,
            token,
            in_sink,
            length,
            start,
            in_chunk,
            SINKS,
            SLOTS,
            VALUE,
        )
        attended = _multiply(weights.to(DTYPE), values, attended * correction[:, None])

    # A query that saw nothing, padding or a split with no tokens for it, has a total of zero and gives zeros.
    attended = attended / tl.where(total > 0, total, 1.0)[:, None]
    rows = tl.num_programs(1) // HEADS
    written = ((split * rows + row) * (HEADS * SHARED) + query_head) * tokens + place
    in_output = place < tokens
    tl.store(
        output + (written * VALUE.head_dim)[:, None] + value_channel[None, :],
        attended.to(output.dtype.element_ty),
        mask=in_output[:, None] & is_value_channel[None, :],
    )
    if SPLITS > 1:
        tl.store(log_sums + written, tl.where(total > 0, highest + tl.log2(total), float("-inf")), mask=in_output)


@triton.jit
def _first_visible(number, sliding_window, attention_chunk, SLIDING: tl.constexpr, CHUNKED: tl.constexpr):
    """The earliest token that a token attends to; below zero for all."""
    if SLIDING:
        return number - sliding_window + 1
    if CHUNKED:
        return number - number % attention_chunk
    return number * 0


@triton.jit
def _load_queries(queries, channel_stride, is_query, KEYS: tl.constexpr):
    """The queries' channels that meet each part of the keys: a tuple of [queries, places].

    queries: pointers to their first channels.
    """
    loaded = tl.tuple([])
    for part in tl.static_range(len(KEYS)):
        channel, is_channel = channels_in_order(part_of(KEYS, part))
        mask = is_query[:, None] & is_channel[None, :]
        loaded += (tl.load(queries[:, None] + (channel * channel_stride)[None, :], mask=mask, other=0.0),)
    return loaded


@triton.jit
def _load_unpacked(
    sink,
    ring,
    chunk,
    chunk_token,
    chunk_channel,
    token,
    in_sink,
    length,
    start,
    in_chunk,
    SINKS: tl.constexpr,
    SLOTS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The elements of tokens that lie in the sink, the ring or the chunk: [tokens, places], zero beyond the chunk."""
    channel, is_channel = channels_in_order(FORMAT)
    in_ring = (token >= in_sink) & (token < length)
    of_chunk = (token >= length) & (token < length + in_chunk)
    slot = tl.where(in_ring, token - SINKS, 0) % SLOTS
    # One of the three is read; the others are masked out.
    elements = tl.load(
        chunk + ((token - length + start).to(tl.int64) * chunk_token)[:, None] + (channel * chunk_channel)[None, :],
        mask=of_chunk[:, None] & is_channel[None, :],
        other=0.0,
    )
    from_ring = tl.load(
        ring + (slot * FORMAT.head_dim)[:, None] + channel[None, :],
        mask=in_ring[:, None] & is_channel[None, :],
        other=0.0,
    )
    elements = tl.where(in_ring[:, None], from_ring, elements)
    if SINKS > 0:
        of_sink = token < in_sink
        from_sink = tl.load(
            sink + (token * FORMAT.head_dim)[:, None] + channel[None, :],
            mask=of_sink[:, None] & is_channel[None, :],
            other=0.0,
        )
        elements = tl.where(of_sink[:, None], from_sink, elements)
    return elements


@triton.jit
def _weigh(scores, visible, distance, highest, total, scale_log2, softcap, slope, SOFTCAP: tl.constexpr):
    """One step of the running softmax, in powers of two.

    Returns the tile's weights, the new maximum and sum, and what the sums up to here must be multiplied by.
    """
    if SOFTCAP:
        # tanh without its overflow: where the exponential is infinite this is 1.
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 / softcap * scale_log2)))
        scores = scores * (softcap * _LOG2_E)
    else:
        scores = scores * scale_log2
    if slope is not None:
        scores += slope[:, None] * distance.to(tl.float32)
    scores = tl.where(visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    # Where nothing was visible yet the maximum is -inf, and -inf less itself no number.
    reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - reference[:, None])
    correction = tl.exp2(highest - reference)
    return weights, new_highest, total * correction + tl.sum(weights, 1), correction


@triton.jit
def _multiply(a, b, added):
    if _INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter's dot takes bfloat16's bits for integers; float32 holds the same numbers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, added, input_precision="ieee")


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
    blocks: int  # packed blocks unpacked at a time
    warps: int = 4

    @classmethod
    def choose(
        cls, queries: int, pairs: int, most_tokens: int, widest: int, itemsize: int, multiprocessors: int
    ) -> Launch:
        """From shapes alone, so that a captured graph stays right as rows grow.

        queries: query heads of a group times tokens; pairs: rows times heads of keys and values; most_tokens: what a
        row can hold; widest: the channels of a key or of a value, the more of them; itemsize: bytes of an element.
        """
        largest = LARGEST_QUERY_TILE if widest <= 128 else LARGEST_QUERY_TILE // 2
        query_tile = min(max(triton.next_power_of_2(queries), SMALLEST_QUERY_TILE), largest)
        query_tiles = triton.cdiv(queries, query_tile)
        padded = triton.next_power_of_2(widest)
        # Where more is padded, or elements are float32, the masks take the registers of a second block.
        blocks = 2 if widest == padded or (itemsize == 2 and 4 * widest >= 3 * padded) else 1
        wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, pairs * query_tiles)
        tiles = triton.cdiv(most_tokens, blocks * BLOCK_TOKENS)
        splits = max(1, min(wanted, tiles, MOST_SPLITS))
        if widest > 128 or query_tile == LARGEST_QUERY_TILE:
            warps = 8
        else:
            # As few as have the registers: each works out and moves what all of them need.
            warps = 2 if widest <= 64 and query_tile == SMALLEST_QUERY_TILE and itemsize == 2 else 4
        # A power of two, so that few variants are compiled as a state grows.
        return cls(query_tile, query_tiles, triton.next_power_of_2(splits), blocks, warps)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    # Triton's interpreter runs on the CPU; one multiprocessor keeps it from splitting what it works off in turn.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@torch.no_grad()
def attend(
    query: Tensor,
    chunk: Chunk,
    state: SiteState,
    storage: Storage,
    weighting: Weighting,
    launch: Launch | None = None,
) -> Tensor:
    """As reference.attend, for contiguous state tensors; never waits for the device.

    launch: how the work is cut; chosen from the shapes where it is not given.
    """
    key, value = chunk.key, chunk.value
    rows, query_heads, tokens, key_dim = query.shape
    heads, value_dim = value.shape[1], value.shape[3]
    shared, itemsize = query_heads // heads, query.element_size()
    output = query.new_empty(rows, query_heads, tokens, value_dim)
    if output.numel() == 0:
        return output
    if launch is None:
        most_tokens = state.sinks + state.blocks * BLOCK_TOKENS + state.recent_slots + tokens
        widest = max(key_dim, value_dim)
        processors = _multiprocessors(query.device)
        launch = Launch.choose(shared * tokens, rows * heads, most_tokens, widest, itemsize, processors)
    splits = launch.splits
    queries = rows * query_heads * tokens
    partial = output if splits == 1 else query.new_empty(splits, queries, value_dim, dtype=torch.float32)
    log_sums = query.new_empty(splits, queries, dtype=torch.float32) if splits > 1 else partial
    attend_kernel[(launch.query_tiles, rows * heads, splits)](
        *(query, key, value, chunk.lengths, chunk.starts, *state.tensors(), partial, log_sums),
        *(weighting.sink_logits, weighting.slopes),
        *(*query.stride(), *key.stride(), *value.stride()),
        *(
            tokens,
            state.blocks,
            weighting.scale,
            weighting.softcap,
            weighting.sliding_window,
            weighting.attention_chunk,
        ),
        HEADS=heads,
        SHARED=shared,
        KEYS=BlockFormat.parts(storage.key, key_dim, itemsize),
        VALUE=BlockFormat.parts(storage.value, value_dim, itemsize)[0],
        SINKS=state.sinks,
        RECENT=storage.recent,
        SLOTS=state.recent_slots,
        SOFTCAP=weighting.softcap != 0,
        SLIDING=weighting.sliding_window != 0,
        CHUNKED=weighting.attention_chunk != 0,
        SPLITS=splits,
        QUERIES=launch.query_tile,
        BLOCKS=launch.blocks,
        THREADS=WARP * launch.warps,
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
