"""append and attend in plain PyTorch: the specification every other kernel is held to, and the CPU's way of running.

Shapes: those of Chunk (chunk.py) and of SiteState (format/state.py), for B rows, H heads of keys and values and M new
tokens; a query is [B, Hq, M, key_dim] with any strides, Hq a multiple of H. Where it has value_dim channels more,
values are keys too: the whole key of a token is its value, followed by what is stored as its key. Which dtypes may
differ: mixed_dtypes.py.
No gradient flows through either operation.
Rows never see each other. Neighbouring rows of one length and start are worked on together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.packing import dequantize_into, quantize_block
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, Axis, Precision
from kvmix_compile.kernels.format.state import SiteState, packed_blocks, required_blocks
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.weighting import Weighting

# Elements of the largest temporary with a query and a key dimension: 256 MB in float32.
MAX_SCORE_ELEMENTS = 2**26


@dataclass(frozen=True)
class _RowGroup:
    """Neighbouring rows that hold equally many tokens and whose chunks begin with equally much padding."""

    rows: slice
    length: int
    start: int


@dataclass(frozen=True)
class _Side:
    """Either the keys or the values: a chunk [B, H, M, dim] and the state it is added to."""

    chunk: Tensor
    sink: Tensor
    packed: Tensor
    ring: Tensor
    precision: Precision
    axis: Axis
    recent: int

    def of(self, group: _RowGroup) -> _Side:
        """Views of a group's rows; its padding is gone."""
        rows = group.rows
        return replace(
            self,
            chunk=self.chunk[rows, :, group.start :],
            sink=self.sink[rows],
            packed=self.packed[rows],
            ring=self.ring[rows],
        )

    @property
    def sinks(self) -> int:
        return self.sink.shape[2]

    def blocks(self, length: int) -> int:
        """Packed blocks of a row of this many tokens."""
        return packed_blocks(length, self.sinks, self.recent)

    def ring_pieces(self, first: int, last: int) -> Iterator[Tensor]:
        """Views of tokens first to last - 1 in the ring, in order."""
        return _pieces(self.ring, first - self.sinks, last - self.sinks)


@torch.no_grad()
def append(chunk: Chunk, state: SiteState, storage: Storage) -> None:
    """Writes a chunk's keys and values into the state, in its dtype and in place, packing the blocks that are recent no
    more.

    The chunk's lengths are those before it and are left as they are.
    Raises KVMixError, with nothing written, where the packed blocks have no room.
    """
    chunk = chunk.in_dtype(state.dtype)
    keys, values = _sides(chunk, state, storage)
    groups = list(_row_groups(chunk))
    longest = max((group.length + chunk.key.shape[2] - group.start for group in groups), default=0)
    _check_capacity(longest, state, storage)
    for group in groups:
        _append_rows(keys.of(group), group.length)
        _append_rows(values.of(group), group.length)


@torch.no_grad()
def attend(query: Tensor, chunk: Chunk, state: SiteState, storage: Storage, weighting: Weighting) -> Tensor:
    """Causal attention of a chunk's queries to the past as stored and to the chunk itself in full precision.

    Returns [B, Hq, M, value_dim] in the query's dtype, contiguous; zeros for padding.
    """
    keys, values = _sides(chunk, state, storage)
    outputs = []
    _check_capacity(max(chunk.lengths.tolist(), default=0), state, storage)
    for group in _row_groups(chunk):
        queries = query[group.rows, :, group.start :]
        its_weighting = weighting.of_length(group.length + queries.shape[2])
        first = its_weighting.first_visible(group.length)
        if queries.shape[2]:
            all_keys = _history(keys.of(group), first, group.length)
            all_values = _history(values.of(group), first, group.length)
            if chunk.values_are_keys(query):
                # Equally wide, which PyTorch's attention is faster with than with fewer values.
                all_keys = all_values = torch.cat([all_values, all_keys], dim=-1)
            attended = _causal_attention(queries, all_keys, all_values, first, its_weighting)
            attended = attended[..., : chunk.value.shape[-1]]
        else:
            attended = queries.new_empty(*queries.shape[:-1], chunk.value.shape[-1])
        outputs.append(F.pad(attended, (0, 0, group.start, 0)) if group.start else attended)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).contiguous()


@torch.no_grad()
def stored(
    state: SiteState, storage: Storage, lengths: Tensor, slots: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The keys [B, H, slots, key_dim] and values [B, H, slots, value_dim] of the past as a later token reads them.

    lengths: int64 [B], the tokens that each row holds, at most `slots`; they lie in a row's last slots. Where there is
    none, or one that no later token sees, are zeros. dtype: of what is returned, as attend would compute.
    """
    no_keys, no_values = state.recent_k[:, :, :0].to(dtype), state.recent_v[:, :, :0].to(dtype)
    nothing_new = Chunk(no_keys, no_values, lengths, starts=torch.zeros_like(lengths))
    read = []
    for side in _sides(nothing_new, state, storage):
        dense = side.chunk.new_zeros(*side.ring.shape[:2], slots, side.ring.shape[3])
        for group in _row_groups(nothing_new):
            first = max(0, group.length - storage.window + 1) if storage.window else 0
            if group.length > first:
                held = _history(side.of(group), first, group.length)
                dense[group.rows, :, slots - held.shape[2] :] = held
        read.append(dense)
    return read[0], read[1]


def _sides(chunk: Chunk, state: SiteState, storage: Storage) -> tuple[_Side, _Side]:
    keys = _Side(
        chunk=chunk.key,
        sink=state.sink_k,
        packed=state.packed_k,
        ring=state.recent_k,
        precision=storage.key,
        axis=Axis.TOKENS,
        recent=storage.recent,
    )
    values = _Side(
        chunk=chunk.value,
        sink=state.sink_v,
        packed=state.packed_v,
        ring=state.recent_v,
        precision=storage.value,
        axis=Axis.CHANNELS,
        recent=storage.recent,
    )
    return keys, values


def _row_groups(chunk: Chunk) -> Iterator[_RowGroup]:
    begin = 0
    for (length, start), members in groupby(zip(chunk.lengths.tolist(), chunk.starts.tolist(), strict=True)):
        end = begin + sum(1 for _ in members)
        yield _RowGroup(slice(begin, end), length, start)
        begin = end


def _check_capacity(length: int, state: SiteState, storage: Storage) -> None:
    needed = required_blocks(length, state.sinks, storage.recent, storage.window)
    if needed > state.blocks:
        raise KVMixError(
            f"{length} tokens need room for {needed} packed blocks and the state has room for {state.blocks}: "
            "grow it first"
        )


def _append_rows(side: _Side, length: int) -> None:
    """The chunk follows a history of `length` tokens."""
    chunk, sinks = side.chunk, side.sinks
    end = length + chunk.shape[2]
    if length < sinks:
        side.sink[:, :, length:end] = chunk[:, :, : sinks - length]
    end_block = side.blocks(end)
    # Of more blocks than there is room for, the first ones are seen by nothing that follows.
    first_block = max(side.blocks(length), end_block - side.packed.shape[2])
    if end_block > first_block:
        first, last = sinks + first_block * BLOCK_TOKENS, sinks + end_block * BLOCK_TOKENS
        earlier = side.ring_pieces(first, min(length, last))
        tokens = torch.cat([*earlier, chunk[:, :, max(0, first - length) : max(0, last - length)]], dim=2)
        packed = quantize_block(tokens.unflatten(2, (-1, BLOCK_TOKENS)), side.precision, side.axis)
        _fill(_pieces(side.packed, first_block, end_block), packed)
    # Only now may the ring be overwritten: the tokens just packed lay in it.
    token = max(length, sinks, end - side.ring.shape[2])
    _fill(side.ring_pieces(token, end), chunk[:, :, max(0, token - length) :])


def _pieces(ring: Tensor, first: int, last: int) -> Iterator[Tensor]:
    """Views of numbers first to last - 1 of a ring [rows, H, slots, ..], in order: none, one, or two where it wraps."""
    slots = ring.shape[2]
    while first < last:
        slot = first % slots
        count = min(last - first, slots - slot)
        yield ring[:, :, slot : slot + count]
        first += count


def _fill(pieces: Iterator[Tensor], content: Tensor) -> None:
    """Writes what lies along dimension 2 of content into the pieces, in order."""
    begin = 0
    for piece in pieces:
        end = begin + piece.shape[2]
        piece.copy_(content[:, :, begin:end])
        begin = end


def _history(side: _Side, first: int, length: int) -> Tensor:
    """Tokens `first` to `length` as stored, and the chunk behind them: [rows, H, length - first + tokens, dim]."""
    chunk, sinks = side.chunk, side.sinks
    if first >= length:
        return chunk
    # A block is unpacked whole, so the history may have to begin a little earlier.
    first_block, end_block = max(0, first - sinks) // BLOCK_TOKENS, side.blocks(length)
    begin = min(first, sinks + first_block * BLOCK_TOKENS)
    rows, heads, tokens, dim = chunk.shape
    history = chunk.new_empty(rows, heads, length - begin + tokens, dim)
    sink = side.sink[:, :, begin:length]
    history[:, :, : sink.shape[2]] = sink
    place = sink.shape[2]
    for packed in _pieces(side.packed, first_block, end_block):
        blocks = history[:, :, place : place + packed.shape[2] * BLOCK_TOKENS]
        dequantize_into(blocks.unflatten(2, (-1, BLOCK_TOKENS)), packed, side.precision, side.axis)
        place += blocks.shape[2]
    for piece in (*side.ring_pieces(begin + place, length), chunk):
        history[:, :, place : place + piece.shape[2]] = piece
        place += piece.shape[2]
    return history[:, :, first - begin :]


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, first: int, weighting: Weighting) -> Tensor:
    """The keys and values are those of all tokens from number `first` on, the queries those of the last of them."""
    tokens, context = q.shape[2], k.shape[2]
    past = context - tokens
    if past == 0 and weighting.is_softmax and not weighting.is_limited and k.shape[3] == v.shape[3]:
        # Only this way does PyTorch attend causally without a mask of the whole prompt, given equal dimensions.
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=weighting.scale, enable_gqa=True)
    outputs = []
    step = max(1, MAX_SCORE_ELEMENTS // (q.shape[0] * q.shape[1] * context))
    for begin in range(0, tokens, step):
        end = min(begin + step, tokens)
        seen = slice(weighting.first_visible(first + past + begin) - first, past + end)
        places = _Places(
            torch.arange(first + past + begin, first + past + end, device=q.device).unsqueeze(1),
            torch.arange(first + seen.start, first + seen.stop, device=q.device),
        )
        outputs.append(_attention(q[:, :, begin:end], k[:, :, seen], v[:, :, seen], places, weighting))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


@dataclass(frozen=True)
class _Places:
    """The numbers in their row of some queries [queries, 1] and of the tokens that they may see [tokens]."""

    query: Tensor
    token: Tensor

    def mask(self, weighting: Weighting) -> Tensor | None:
        """Bool [queries, tokens], True where attended to; None where everything is."""
        if len(self.query) == 1:
            return None
        mask = self.token <= self.query
        return mask & (self.token >= weighting.first_visible(self.query)) if weighting.is_limited else mask


def _attention(q: Tensor, k: Tensor, v: Tensor, places: _Places, weighting: Weighting) -> Tensor:
    """Keys and values serve all the query heads of a group as if these were more queries, and are never repeated."""
    heads, tokens = k.shape[1], q.shape[2]
    shared = q.shape[1] // heads
    queries, mask = q.unflatten(1, (heads, shared)), places.mask(weighting)
    if weighting.is_softmax:
        if mask is not None and shared > 1:
            mask = mask.repeat(shared, 1)
        attended = F.scaled_dot_product_attention(queries.flatten(2, 3), k, v, attn_mask=mask, scale=weighting.scale)
        return attended.unflatten(2, (shared, tokens)).flatten(1, 2)
    weights = _weights(queries.float() @ k.float().unsqueeze(2).mT, mask, places, weighting)
    return (weights @ v.float().unsqueeze(2)).to(q.dtype).flatten(1, 2)


def _weights(products: Tensor, mask: Tensor | None, places: _Places, weighting: Weighting) -> Tensor:
    """products: float32 [rows, H, query heads of each, queries, tokens], overwritten. Returns the same of weights."""
    by_head = (*products.shape[1:3], 1, 1)
    scores = products.mul_(weighting.scale)
    if weighting.softcap:
        scores = scores.div_(weighting.softcap).tanh_().mul_(weighting.softcap)
    if weighting.slopes is not None:
        scores += weighting.slopes.float().view(by_head) * (places.token - places.query)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    if weighting.sink_logits is None:
        return scores.softmax(-1)
    sink = weighting.sink_logits.float().view(by_head).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
