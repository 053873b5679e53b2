"""As attend_elements.py, of packed blocks whose elements are never made: see codes.py. A program is one warp."""

# What a kernel is given has no Python type: pointers, numbers and tensors of Triton's own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.gpu.codes import (
    add_values,
    channels_of_keys,
    channels_of_values,
    columns_of_zero_points,
    element,
    in_order_of_channels,
    in_order_of_keys,
    in_order_of_values,
    in_whole_units,
    load_keys,
    load_values,
    nothing_attended,
    pieces,
    scores_of_keys,
)
from kvmix_compile.kernels.gpu.tiles import first_visible, load_unpacked, multiply, tiles_of_split, weigh

_TOKENS = tl.constexpr(BLOCK_TOKENS)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Unpacked tokens at a time: as few as tensor cores multiply, for their elements' and masks' registers.
_UNPACKED = tl.constexpr(16)


@triton.jit
def attend_codes_kernel(
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
    KEYS: tl.constexpr,  # Rows of a block
    VALUES: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    SLOTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLIDING: tl.constexpr,
    CHUNKED: tl.constexpr,
    SPLITS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """A tile of queries over one split of its tokens: values averaged, and what their weights sum to."""
    first_query = tl.program_id(0) * QUERIES
    row = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    start = tl.load(starts + row).to(tl.int32)

    query = first_query + tl.arange(0, QUERIES)
    place = query // SHARED
    is_query = (place >= start) & (place < tokens)
    number = length - start + place
    earliest = first_visible(number, sliding_window, attention_chunk, SLIDING, CHUNKED)
    query_head = head * SHARED + query % SHARED
    queries = tl.tuple([])
    for part in tl.static_range(len(KEYS)):
        channel, is_channel = channels_of_keys(element(KEYS, part))
        pointers = q + row * q_row + (query_head * q_head + place * q_token)[:, None] + (channel * q_channel)[None, :]
        of_part = tl.load(pointers, mask=is_query[:, None] & is_channel[None, :], other=0.0)
        queries += (in_order_of_keys(of_part, element(KEYS, part)),)

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
        1,
        _UNPACKED,
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
    attended = nothing_attended(QUERIES, VALUES)
    zero_points = tl.zeros([QUERIES, columns_of_zero_points(VALUES)], tl.float32)
    place_in_tile = tl.arange(0, _TOKENS)

    state_head = row * HEADS + head
    head_of_packed_k = packed_k + state_head * capacity * KEY_BYTES
    head_of_packed_v = packed_v + state_head * capacity * VALUE_BYTES
    # Values are read while keys are worked on, and the next keys while values are; behind the last block its own again.
    packed_end = tl.minimum(end, packed_tiles)
    if begin < packed_end:
        slot = _slot(first_block + begin, capacity, SLIDING or CHUNKED)
        next_keys = load_keys(head_of_packed_k + slot * KEY_BYTES, KEYS, KEY_GROUP)
        for tile in tl.range(begin, packed_end, num_stages=1):
            block = first_block + tile
            keys, values = next_keys, load_values(head_of_packed_v + slot * VALUE_BYTES, VALUES)
            scores = scores_of_keys(keys, queries, KEYS, KEY_GROUP)
            slot = _slot(tl.minimum(block + 1, first_block + packed_end - 1), capacity, SLIDING or CHUNKED)
            next_keys = load_keys(head_of_packed_k + slot * KEY_BYTES, KEYS, KEY_GROUP)
            token = SINKS + block * _TOKENS + place_in_tile
            visible = token[None, :] >= earliest[:, None] if SLIDING or CHUNKED else None
            weights, highest, total, correction = weigh(
                scores, visible, token[None, :] - number[:, None], highest, total, scale_log2, softcap, slope, SOFTCAP
            )
            attended, zero_points = add_values(
                values, weights.to(tl.bfloat16), attended, zero_points, correction, VALUES
            )
        attended = in_whole_units(attended, zero_points, VALUES)

    head_of_sink_k = sink_k + state_head * SINKS * KEY_DIM
    head_of_sink_v = sink_v + state_head * SINKS * VALUE_DIM
    head_of_recent_k = recent_k + state_head * SLOTS * KEY_DIM
    head_of_recent_v = recent_v + state_head * SLOTS * VALUE_DIM
    key_places = (head_of_sink_k, head_of_recent_k, k + row * k_row + head * k_head, k_token, k_channel)
    value_places = (head_of_sink_v, head_of_recent_v, v + row * v_row + head * v_head, v_token, v_channel)
    span = (in_sink, in_chunk, length, start)
    for tile in tl.range(tl.maximum(begin, packed_tiles), end, num_stages=1):
        index = skipped + (tile - packed_tiles) * _UNPACKED + tl.arange(0, _UNPACKED)
        token = tl.where(index < in_sink, index, index + blocks * _TOKENS)
        scores = tl.zeros([QUERIES, _UNPACKED], tl.float32)
        scores = _add_unpacked_scores(key_places, token, span, queries, scores, KEYS, SINKS, SLOTS, KEY_DIM)
        visible = is_query[:, None] & (token[None, :] <= number[:, None])
        if SLIDING or CHUNKED:
            visible &= token[None, :] >= earliest[:, None]
        weights, highest, total, correction = weigh(
            scores, visible, token[None, :] - number[:, None], highest, total, scale_log2, softcap, slope, SOFTCAP
        )
        attended = _add_unpacked_values(
            value_places, token, span, weights.to(tl.bfloat16), attended, correction, VALUES, SINKS, SLOTS, VALUE_DIM
        )

    # A query that saw nothing, padding or a split with no tokens for it, gives zeros.
    total = tl.where(is_query, total, 0.0)
    rows = tl.num_programs(1) // HEADS
    written = ((split * rows + row) * (HEADS * SHARED) + query_head) * tokens + place
    in_output = place < tokens
    for piece in tl.static_range(pieces(VALUES)):
        channel = channels_of_values(element(VALUES, piece % len(VALUES)), piece // len(VALUES))
        mean = tl.where((total > 0)[:, None], attended[piece] / tl.where(total > 0, total, 1.0)[:, None], 0.0)
        mean = in_order_of_channels(mean, element(VALUES, piece % len(VALUES)))
        pointers = output + (written * VALUE_DIM)[:, None] + channel[None, :]
        tl.store(pointers, mean.to(output.dtype.element_ty), mask=in_output[:, None])
    if SPLITS > 1:
        tl.store(log_sums + written, tl.where(total > 0, highest + tl.log2(total), float("-inf")), mask=in_output)


@triton.jit
def _add_unpacked_scores(
    places,
    token,
    span,
    queries,
    scores,
    KEYS: tl.constexpr,
    SINKS: tl.constexpr,
    SLOTS: tl.constexpr,
    KEY_DIM: tl.constexpr,
):
    for part in tl.static_range(len(KEYS)):
        channel, is_channel = channels_of_keys(element(KEYS, part))
        elements = load_unpacked(places, token, span, channel, is_channel, SINKS, SLOTS, KEY_DIM)
        scores = multiply(queries[part], in_order_of_keys(elements, element(KEYS, part)).trans(), scores)
    return scores


@triton.jit
def _add_unpacked_values(
    places,
    token,
    span,
    weights,
    attended,
    correction,
    VALUES: tl.constexpr,
    SINKS: tl.constexpr,
    SLOTS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    added = tl.tuple([])
    for piece in tl.static_range(pieces(VALUES)):
        channel = channels_of_values(element(VALUES, piece % len(VALUES)), piece // len(VALUES))
        elements = load_unpacked(places, token, span, channel, channel >= 0, SINKS, SLOTS, VALUE_DIM)
        elements = in_order_of_values(elements, element(VALUES, piece % len(VALUES)))
        added += (multiply(weights, elements, attended[piece] * correction[:, None]),)
    return added


@triton.jit
def _slot(block, capacity, IS_RING: tl.constexpr):
    return (block % capacity if IS_RING else block).to(tl.int64)
