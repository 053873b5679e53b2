"""Split-KV flash decoding over a quantized state whose elements are made in registers, of any bits
and dtype, for any number of queries. attend.py says what a program does.
"""

# What a kernel is given has no Python type: pointers, numbers and tensors of Triton's own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.gpu.pages import bytes_to_blocks
from kvmix_compile.kernels.gpu.tiles import first_visible, load_unpacked, multiply, tiles_of_split, weigh
from kvmix_compile.kernels.gpu.unpack import channels_in_order, part_of, unpack_keys, unpack_values

_TOKENS = tl.constexpr(BLOCK_TOKENS)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_elements_kernel(
    q,
    k,
    v,
    lengths,
    starts,
    sink_k,  # of pages None
    sink_v,
    packed_k,
    packed_v,
    recent_k,  # of pages the raw ones
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
    raw=None,  # tables of pages, their strides, and the strides of pools (pages.py); of a state none
    packed=None,
    raw_row=None,
    packed_row=None,
    raw_k_page=None,
    raw_k_head=None,
    raw_k_place=None,
    raw_v_page=None,
    raw_v_head=None,
    raw_v_place=None,
    packed_k_page=None,
    packed_k_head=None,
    packed_k_place=None,
    packed_v_page=None,
    packed_v_head=None,
    packed_v_place=None,
    PAGE_TOKENS: tl.constexpr = 0,
    PAGE_BLOCKS: tl.constexpr = 0,
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
    earliest = first_visible(number, sliding_window, attention_chunk, SLIDING, CHUNKED)
    value_channel, is_value_channel = channels_in_order(VALUE)
    query_head = head * SHARED + query % SHARED
    queries = _load_queries(q + row * q_row + query_head * q_head + place * q_token, q_channel, is_query, KEYS)

    tiles, stored, present = tiles_of_split(
        length,
        start,
        tokens,
        first_query,
        sliding_window,
        attention_chunk,
        split,
        SHARED,
        QUERIES,
        BLOCKS,
        TILE,
        SINKS,
        RECENT,
        SLIDING,
        CHUNKED,
        SPLITS,
    )
    begin, end, packed_tiles = tiles
    first_block, blocks = stored
    skipped, in_sink, in_chunk = present

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
    key_bytes, value_bytes = KEYS[0].block_bytes, VALUE.block_bytes
    head_of_packed_k = packed_k + (head * packed_k_head if PAGE_BLOCKS > 0 else state_head * capacity * key_bytes)
    head_of_packed_v = packed_v + (head * packed_v_head if PAGE_BLOCKS > 0 else state_head * capacity * value_bytes)
    # Of a window only the last blocks may be kept; elsewhere each lies in its own place.
    ring = capacity if SLIDING or CHUNKED else None
    table = packed + row * packed_row if PAGE_BLOCKS > 0 else None
    PAGED: tl.constexpr = PAGE_BLOCKS > 0
    for tile in tl.range(begin, tl.minimum(end, packed_tiles)):
        block = first_block + tile * BLOCKS
        token = SINKS + block * _TOKENS + place_in_tile
        key_blocks = (
            bytes_to_blocks(table, block, blocks, packed_k_page, packed_k_place, BLOCKS, PAGE_BLOCKS) if PAGED else ring
        )
        value_blocks = (
            bytes_to_blocks(table, block, blocks, packed_v_page, packed_v_place, BLOCKS, PAGE_BLOCKS) if PAGED else ring
        )
        scores = tl.zeros([QUERIES, TILE], tl.float32)
        for part in tl.static_range(len(KEYS)):
            keys = unpack_keys(
                head_of_packed_k, key_blocks, block, blocks, DTYPE, BLOCKS, part_of(KEYS, part), THREADS, PAGED
            )
            scores = multiply(queries[part], keys.trans(), scores)
        visible = is_query[:, None] & (token < SINKS + blocks * _TOKENS)[None, :]
        if SLIDING or CHUNKED:
            visible &= token[None, :] >= earliest[:, None]
        weights, highest, total, correction = weigh(
            scores, visible, token[None, :] - number[:, None], highest, total, scale_log2, softcap, slope, SOFTCAP
        )
        values = unpack_values(head_of_packed_v, value_blocks, block, blocks, DTYPE, BLOCKS, VALUE, THREADS, PAGED)
        attended = multiply(weights.to(DTYPE), values, attended * correction[:, None])

    head_of_k, head_of_v = k + row * k_row + head * k_head, v + row * v_row + head * v_head
    key_places = (
        (raw + row * raw_row, recent_k + head * raw_k_head, raw_k_page, raw_k_place, head_of_k, k_token, k_channel)
        if PAGE_TOKENS > 0
        else (
            sink_k + state_head * SINKS * KEYS[0].head_dim,
            recent_k + state_head * SLOTS * KEYS[0].head_dim,
            head_of_k,
            k_token,
            k_channel,
        )
    )
    value_places = (
        (raw + row * raw_row, recent_v + head * raw_v_head, raw_v_page, raw_v_place, head_of_v, v_token, v_channel)
        if PAGE_TOKENS > 0
        else (
            sink_v + state_head * SINKS * VALUE.head_dim,
            recent_v + state_head * SLOTS * VALUE.head_dim,
            head_of_v,
            v_token,
            v_channel,
        )
    )
    span = (in_sink, in_chunk, length, start)
    # Few tiles: reading ahead would only take shared memory from the loop above.
    for tile in tl.range(tl.maximum(begin, packed_tiles), end, num_stages=1):
        index = skipped + (tile - packed_tiles) * TILE + place_in_tile
        token = tl.where(index < in_sink, index, index + blocks * _TOKENS)
        scores = tl.zeros([QUERIES, TILE], tl.float32)
        for part in tl.static_range(len(KEYS)):
            scores = _add_unpacked_scores(
                key_places, token, span, queries[part], scores, part_of(KEYS, part), SINKS, SLOTS, PAGE_TOKENS
            )
        visible = is_query[:, None] & (token[None, :] <= number[:, None])
        if SLIDING or CHUNKED:
            visible &= token[None, :] >= earliest[:, None]
        weights, highest, total, correction = weigh(
            scores, visible, token[None, :] - number[:, None], highest, total, scale_log2, softcap, slope, SOFTCAP
        )
        values = load_unpacked(
            *(value_places, token, span, value_channel, is_value_channel, SINKS, SLOTS, VALUE.head_dim, PAGE_TOKENS)
        )
        attended = multiply(weights.to(DTYPE), values, attended * correction[:, None])

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
def _add_unpacked_scores(
    places,
    token,
    span,
    queries,
    scores,
    FORMAT: tl.constexpr,
    SINKS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGE: tl.constexpr,
):
    channel, is_channel = channels_in_order(FORMAT)
    keys = load_unpacked(places, token, span, channel, is_channel, SINKS, SLOTS, FORMAT.head_dim, PAGE)
    return multiply(queries, keys.trans(), scores)
