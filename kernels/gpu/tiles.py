"""What both kernels of attend go by: which tokens a split takes, those that are not packed, and the running softmax."""

# What a kernel is given has no Python type: pointers, numbers and tensors of Triton's own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.gpu.pages import offset_in_pages

_TOKENS = tl.constexpr(BLOCK_TOKENS)
_LOG2_E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tiles_of_split(
    length,
    start,
    tokens,
    first_query,
    sliding_window,
    attention_chunk,
    split,
    SHARED: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNPACKED: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    SLIDING: tl.constexpr,
    CHUNKED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The tiles that a split takes of a tile of queries, in order: the past as stored, then what is not packed: the
    sink, the ring and the chunk up to the tile's last token.

    BLOCKS: of a tile that is packed; UNPACKED: tokens of one that is not.
    Returns (begin, end, packed_tiles), the number of packed tiles of all splits; (first_block, blocks), those that are
    seen; (skipped, in_sink, in_chunk), unpacked tokens that are not seen, tokens in the sink, and in the chunk.
    """
    last_place = tl.minimum((first_query + QUERIES - 1) // SHARED, tokens - 1)
    first_number = length - start + tl.maximum(first_query // SHARED, start)
    seen = first_visible(first_number, sliding_window, attention_chunk, SLIDING, CHUNKED)
    beyond = tl.maximum(length - SINKS - RECENT, 0)
    blocks = (beyond + _TOKENS - 1) // _TOKENS
    first_block = tl.minimum(tl.maximum(seen - SINKS, 0) // _TOKENS, blocks)
    in_sink = tl.minimum(length, SINKS)
    in_chunk = tl.maximum(last_place - start + 1, 0)
    skipped = tl.maximum(tl.minimum(seen, in_sink), seen - blocks * _TOKENS)
    skipped = tl.maximum(skipped, 0)
    unpacked = tl.maximum(length - blocks * _TOKENS + in_chunk - skipped, 0)
    packed_tiles = (blocks - first_block + BLOCKS - 1) // BLOCKS
    tiles = packed_tiles + (unpacked + UNPACKED - 1) // UNPACKED
    if last_place < start:
        tiles = 0
    per_split = (tiles + SPLITS - 1) // SPLITS
    begin = tl.minimum(split * per_split, tiles)
    end = tl.minimum(begin + per_split, tiles)
    return (begin, end, packed_tiles), (first_block, blocks), (skipped, in_sink, in_chunk)


@triton.jit
def first_visible(number, sliding_window, attention_chunk, SLIDING: tl.constexpr, CHUNKED: tl.constexpr):
    """The earliest token that a token attends to; below zero for all."""
    if SLIDING:
        return number - sliding_window + 1
    if CHUNKED:
        return number - number % attention_chunk
    return number * 0


@triton.jit
def load_unpacked(
    places,
    token,
    span,
    channel,
    is_channel,
    SINKS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
):
    """The elements of tokens that are not packed: [tokens, channels], zero beyond the chunk.

    places: where they lie, of the row and head. In a state, pointers to sink and ring; in pages of PAGE tokens, which
    else is 0, pointers to the row's entries of the table and to the pool, and its strides from page to page and from
    token to token. Behind these a pointer to the chunk, and its strides from token to token and from channel to
    channel. span: (in_sink, in_chunk, length, start).
    """
    if PAGE > 0:
        table, pool, page_stride, token_stride, chunk, chunk_token, chunk_channel = places
        elements = _load_of_chunk(chunk, chunk_token, chunk_channel, token, span, channel, is_channel)
        of_past = token < span[2]
        offset = offset_in_pages(token, of_past, table, page_stride, token_stride, PAGE)
        mask = of_past[:, None] & is_channel[None, :]
        from_page = tl.load(pool + offset[:, None] + channel[None, :], mask=mask, other=0.0)
        elements = tl.where(of_past[:, None], from_page, elements)
    else:
        sink, ring, chunk, chunk_token, chunk_channel = places
        in_sink, _, length, _ = span
        # One of the three is read; the others are masked out.
        elements = _load_of_chunk(chunk, chunk_token, chunk_channel, token, span, channel, is_channel)
        in_ring = (token >= in_sink) & (token < length)
        slot = tl.where(in_ring, token - SINKS, 0) % SLOTS
        from_ring = tl.load(
            ring + (slot * HEAD_DIM)[:, None] + channel[None, :],
            mask=in_ring[:, None] & is_channel[None, :],
            other=0.0,
        )
        elements = tl.where(in_ring[:, None], from_ring, elements)
        if SINKS > 0:
            of_sink = token < in_sink
            from_sink = tl.load(
                sink + (token * HEAD_DIM)[:, None] + channel[None, :],
                mask=of_sink[:, None] & is_channel[None, :],
                other=0.0,
            )
            elements = tl.where(of_sink[:, None], from_sink, elements)
    return elements


@triton.jit
def _load_of_chunk(chunk, token_stride, channel_stride, token, span, channel, is_channel):
    _, in_chunk, length, start = span
    of_chunk = (token >= length) & (token < length + in_chunk)
    place = (token - length + start).to(tl.int64) * token_stride
    return tl.load(
        chunk + place[:, None] + (channel * channel_stride)[None, :],
        mask=of_chunk[:, None] & is_channel[None, :],
        other=0.0,
    )


@triton.jit
def weigh(scores, visible, distance, highest, total, scale_log2, softcap, slope, SOFTCAP: tl.constexpr):
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
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    # Where nothing was visible yet the maximum is -inf, and -inf less itself no number.
    reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - reference[:, None])
    correction = tl.exp2(highest - reference)
    return weights, new_highest, total * correction + tl.sum(weights, 1), correction


@triton.jit
def multiply(a, b, added):
    """added + a b, in float32."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter's dot takes bfloat16's bits for integers; float32 holds the same numbers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, added, input_precision="ieee")
