"""Stored reads: how the loss changes with each read of keys and values that the cache holds in quantized form.

Attention reads a key or value many times: by the tokens right behind it while it is still in full precision, and by all
later ones as it is stored. Only the reads from storage see the quantization error, so only they count. How much each
does follows from the gradient of attention's output alone (FlashAttention, arXiv 2205.14135, appendix B.2), with
everything but the reads from storage masked out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvmix_compile.passes.match.masks import ScoreFunction


@dataclass(frozen=True)
class StoredReads:
    """What an error `[kv_heads, tokens, dim]` of stored keys, or values, does to the loss: through channel c of what
    token t reads with a query head, ``(weights @ error)[t, c] * vectors[t, c]``, to first order.

    weights: float32 `[kv_heads, query heads of each, tokens, tokens]`, 0 where token t (the last but one dimension)
        reads another in full precision, or not at all.
    vectors: float32 `[kv_heads, query heads of each, tokens, dim]`.
    """

    weights: Tensor
    vectors: Tensor

    def changes(self, error: Tensor, tokens: slice) -> Tensor:
        """Of the loss, as above, `[kv_heads, query heads of each, tokens, dim]`, where the error, `[kv_heads, n, dim]`,
        is that of these tokens.
        """
        return (self.weights[..., tokens] @ error[:, None]) * self.vectors

    def gradient(self) -> Tensor:
        """Of the loss with respect to what is stored, `[kv_heads, tokens, dim]`."""
        return (self.weights.mT @ self.vectors).sum(1)

    def of_turned(self, matrix: Tensor) -> StoredReads:
        """The same where what is stored, times `matrix`, is what was stored."""
        return StoredReads(self.weights, self.vectors @ matrix.T)

    def of_channels(self, channels: slice) -> StoredReads:
        """The same of these channels alone."""
        return StoredReads(self.weights, self.vectors[..., channels])


@dataclass(frozen=True)
class JointReads:
    """How what is read in several ways at once, such as values that are keys too, changes the loss: the changes add
    up.
    """

    ways: tuple[StoredReads, ...]

    @property
    def vectors(self) -> Tensor:
        """Of the first way."""
        return self.ways[0].vectors

    def changes(self, error: Tensor, tokens: slice) -> Tensor:
        """As of StoredReads."""
        first, *others = (way.changes(error, tokens) for way in self.ways)
        for other in others:
            first += other
        return first

    def of_turned(self, matrix: Tensor) -> JointReads:
        """As of StoredReads."""
        return JointReads(tuple(way.of_turned(matrix) for way in self.ways))


@dataclass(frozen=True)
class RowAttention:
    """What one site's attention reads in one row, and what of it from storage: a token is read from there by those at
    least `recent` tokens behind it, the first `sinks` tokens never.

    query: `[query heads, tokens, key_dim]`.
    key: `[kv_heads, tokens, key_dim]`, whole: where values are keys too, with these in front.
    value: `[kv_heads, tokens, value_dim]`.
    gradient: that of the loss with respect to attention's output, `[query heads, tokens, value_dim]`.
    sink_logits: scores without values, `[query heads]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    function: ScoreFunction
    sinks: int
    recent: int
    sink_logits: Tensor | None = None

    @cached_property
    def what_is_read(self) -> tuple[Tensor, Tensor]:
        """Bool `[tokens, tokens]`: what each token attends to, and what of that it reads from storage."""
        mask = self.function.mask
        token = torch.arange(self.key.shape[1], device=self.key.device)
        distance = token[:, None] - token
        attends = distance >= 0
        if mask.kind == "sliding":
            attends &= distance < mask.size
        if mask.kind == "chunked":
            attends &= token[:, None] // mask.size == token // mask.size
        return attends, attends & (distance >= self.recent) & (token >= self.sinks)

    def by_key_head(self, of_query_heads: Tensor) -> Tensor:
        """Float32 `[kv_heads, query heads of each, ...]` of what is `[query heads, ...]`."""
        return of_query_heads.float().unflatten(0, (len(self.key), -1))

    @cached_property
    def slopes(self) -> Tensor:
        """ALiBi's, or 0, `[kv_heads, query heads of each]`."""
        slopes = self.query.new_tensor(self.function.slopes or (0.0,), dtype=torch.float32)
        return self.by_key_head(slopes.expand(len(self.query)))

    @cached_property
    def sink_logits_of_heads(self) -> Tensor:
        """The sink logits `[kv_heads, query heads of each]`. Without any, minus infinity takes no part in a softmax."""
        if self.sink_logits is None:
            return torch.full_like(self.slopes, -torch.inf)
        return self.by_key_head(self.sink_logits)


def stored_reads(row: RowAttention) -> tuple[StoredReads, StoredReads]:
    """The reads of stored keys, and those of stored values, of one row."""
    attends, stored = row.what_is_read
    queries, gradients = row.by_key_head(row.query), row.by_key_head(row.gradient)
    heads = (queries, row.key.float(), row.value.float(), gradients, row.sink_logits_of_heads, row.slopes)
    # A head at a time: what is worked out on the way are several matrices of tokens by tokens for each query head.
    pairs = [_of_head(_Head(*parts), row.function, attends, stored) for parts in zip(*heads, strict=True)]
    key_weights, value_weights = (torch.stack(weights) for weights in zip(*pairs, strict=True))
    return StoredReads(key_weights, queries), StoredReads(value_weights, gradients)


@dataclass(frozen=True)
class _Head:
    """One head of keys and values `[tokens, dim]`; of the query heads of its group `query` and `gradient` `[query
    heads, tokens, dim]`, `sink_logits` and ALiBi's `slopes` `[query heads]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    sink_logits: Tensor
    slopes: Tensor


def _of_head(head: _Head, function: ScoreFunction, attends: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """How much each read of a key weighs, and each of a value, `[query heads, tokens, tokens]`."""
    scores = head.query @ head.key.T * function.scale
    bend = 1 - torch.tanh(scores / function.softcap).square() if function.softcap else 1.0
    token = torch.arange(len(head.key), device=scores.device)
    weights = attention_weights(
        scores, function, head.slopes, head.sink_logits, distance=token - token[:, None], attends=attends
    )
    mean = (head.gradient * (weights @ head.value)).sum(-1, keepdim=True)
    weights_read = weights * stored
    score_gradients = weights_read * (head.gradient @ head.value.T - mean) * bend
    return score_gradients * function.scale, weights_read


def attention_weights(
    scores: Tensor, function: ScoreFunction, slopes: Tensor, sink_logits: Tensor, distance: Tensor, attends: Tensor
) -> Tensor:
    """The weights of attention, `[..., reading tokens, tokens]`, of scores that are neither capped nor masked yet.

    slopes, sink_logits: of each head, `[...]`. distance: from each reading token to each other, `[reading tokens,
    tokens]`; attends: whether it sees that one.
    """
    if function.softcap:
        scores = torch.tanh(scores / function.softcap) * function.softcap
    scores = scores + slopes[..., None, None] * distance
    sink = sink_logits[..., None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores.masked_fill(~attends, -torch.inf), sink], dim=-1).softmax(-1)[..., :-1]
