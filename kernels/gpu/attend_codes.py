"""As attend_elements.py, of packed blocks whose elements are never made: see codes.py. A program is one warp."""

# What a kernel is given has no Python type: pointers, numbers and tensors of Triton's own.
# mypy: disable-error-code="no-untyped-def"
# Behind a return Triton compiles what is not in an else.
# ruff: noqa: RET505

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
    head_of_packed_k = packed_k + (head * packed_k_head if PAGE_BLOCKS > 0 else state_head * capacity * KEY_BYTES)
    head_of_packed_v = packed_v + (head * packed_v_head if PAGE_BLOCKS > 0 else state_head * capacity * VALUE_BYTES)
    # Of a window only the last blocks may be kept; elsewhere each lies in its own place.
    ring = capacity if SLIDING or CHUNKED else None
    places = packed + row * packed_row if PAGE_BLOCKS > 0 else ring
    # Values are read while keys are worked on, and the next keys while values are; behind the last block its own again.
    packed_end = tl.minimum(end, packed_tiles)
    if begin < packed_end:
        slot = _slot(first_block + begin, places, PAGE_BLOCKS)
        key_bytes = _bytes_to(slot, packed_k_page, packed_k_place, KEY_BYTES, PAGE_BLOCKS)
        next_keys = load_keys(head_of_packed_k + key_bytes, KEYS, KEY_GROUP)
        for tile in tl.range(begin, packed_end, num_stages=1):
            block = first_block + tile
            value_bytes = _bytes_to(slot, packed_v_page, packed_v_place, VALUE_BYTES, PAGE_BLOCKS)
            keys, values = next_keys, load_values(head_of_packed_v + value_bytes, VALUES)
            scores = scores_of_keys(keys, queries, KEYS, KEY_GROUP)
            slot = _slot(tl.minimum(block + 1, first_block + packed_end - 1), places, PAGE_BLOCKS)
            key_bytes = _bytes_to(slot, packed_k_page, packed_k_place, KEY_BYTES, PAGE_BLOCKS)
            next_keys = load_keys(head_of_packed_k + key_bytes, KEYS, KEY_GROUP)
            token = SINKS + block * _TOKENS + place_in_tile
            visible = token[None, :] >= earliest[:, None] if SLIDING or CHUNKED else None
            weights, highest, total, correction = weigh(
                scores, visible, token[None, :] - number[:, None], highest, total, scale_log2, softcap, slope, SOFTCAP
            )
            attended, zero_points = add_values(
                values, weights.to(tl.bfloat16), attended, zero_points, correction, VALUES
            )
        attended = in_whole_units(attended, zero_points, VALUES)

    head_of_k, head_of_v = k + row * k_row + head * k_head, v + row * v_row + head * v_head
    key_places = (
        (raw + row * raw_row, recent_k + head * raw_k_head, raw_k_page, raw_k_place, head_of_k, k_token, k_channel)
        if PAGE_TOKENS > 0
        else (
            sink_k + state_head * SINKS * KEY_DIM,
            recent_k + state_head * SLOTS * KEY_DIM,
            head_of_k,
            k_token,
            k_channel,
        )
    )
    value_places = (
        (raw + row * raw_row, recent_v + head * raw_v_head, raw_v_page, raw_v_place, head_of_v, v_token, v_channel)
        if PAGE_TOKENS > 0
        else (
            sink_v + state_head * SINKS * VALUE_DIM,
            recent_v + state_head * SLOTS * VALUE_DIM,
            head_of_v,
            v_token,
            v_channel,
        )
    )
    span = (in_sink, in_chunk, length, start)
    for tile in tl.range(tl.maximum(begin, packed_tiles), end, num_stages=1):
        index = skipped + (tile - packed_tiles) * _UNPACKED + tl.arange(0, _UNPACKED)
        token = tl.where(index < in_sink, index, index + blocks * _TOKENS)
        scores = tl.zeros([QUERIES, _UNPACKED], tl.float32)
        scores = _add_unpacked_scores(
            key_places, token, span, queries, scores, KEYS, SINKS, SLOTS, KEY_DIM, PAGE_TOKENS
        )
        visible = is_query[:, None] & (token[None, :] <= number[:, None])
        if SLIDING or CHUNKED:
            visible &= token[None, :] >= earliest[:, None]
        weights, highest, total, correction = weigh(
            scores, visible, token[None, :] - number[:, None], highest, total, scale_log2, softcap, slope, SOFTCAP
        )
        attended = _add_unpacked_values(
            *(value_places, token, span, weights.to(tl.bfloat16), attended, correction),
            *(VALUES, SINKS, SLOTS, VALUE_DIM, PAGE_TOKENS),
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
    PAGE: tl.constexpr,
):
    for part in tl.static_range(len(KEYS)):
        channel, is_channel = channels_of_keys(element(KEYS, part))
        elements = load_unpacked(places, token, span, channel, is_channel, SINKS, SLOTS, KEY_DIM, PAGE)
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
    PAGE: tl.constexpr,
):
    added = tl.tuple([])
    for piece in tl.static_range(pieces(VALUES)):
        channel = channels_of_values(element(VALUES, piece % len(VALUES)), piece // len(VALUES))
        elements = load_unpacked(places, token, span, channel, channel >= 0, SINKS, SLOTS, VALUE_DIM, PAGE)
        elements = in_order_of_values(elements, element(VALUES, piece % len(VALUES)))
        added += (multiply(weights, elements, attended[piece] * correction[:, None]),)
    return added


@triton.jit
def _slot(block, places, PAGE: tl.constexpr):
    """The number of the place in which a block lies, of the row and head, or of all pages.

    places: None where each lies in its own; how many there are where later blocks may have taken those of earlier ones;
    or of pages of PAGE blocks, which else is 0, a pointer to the row's entries of the table.
    """
    if PAGE > 0:
        return tl.load(places + block // PAGE).to(tl.int64) * PAGE + block % PAGE
    else:
        return (block if places is None else block % places).to(tl.int64)


@triton.jit
def _bytes_to(slot, page_stride, block_stride, BYTES: tl.constexpr, PAGE: tl.constexpr):
    """From the first byte of a head's blocks to the one that lies in a slot; of pages, these are its strides."""
    if PAGE > 0:
        return slot // PAGE * page_stride + slot % PAGE * block_stride
    else:
        return slot * BYTES
