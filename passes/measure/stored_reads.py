"""Stored reads: how the loss changes with each read of keys and values that the cache holds in quantized form.

Attention reads a key or value many times: by the tokens right behind it while it is still in full precision, and by all
later ones as it is stored. Only the reads from storage see the quantization error, so only they count. How much each
does follows from the gradient of attention's output alone (FlashAttention, arXiv 2205.14135, appendix B.2), with
everything but the reads from storage masked out.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def stored_reads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    function: ScoreFunction,
    sinks: int,
    recent: int,
    sink_logits: Tensor | None = None,
) -> tuple[StoredReads, StoredReads]:
    """The reads of stored keys, and those of stored values, of one row.

    `query` `[query heads, tokens, key_dim]`, `key` `[kv_heads, tokens, key_dim]`, `value` `[kv_heads, tokens,
    value_dim]`; `gradient` `[query heads, tokens, value_dim]`, that with respect to attention's output. A token
    is read from storage by those at least `recent` tokens behind it, the first `sinks` tokens never. `sink_logits`
    `[query heads]`: scores without values.
    """
    heads = key.shape[0]
    attends, stored = what_is_read(key.shape[1], function, sinks, recent, key.device)
    slopes = query.new_tensor(function.slopes or (0.0,), dtype=torch.float32).expand(len(query))
    # Without any, minus infinity takes no part in a softmax.
    logits = query.new_full((len(query),), -torch.inf) if sink_logits is None else sink_logits
    queries, gradients, logits, slopes = (
        part.float().unflatten(0, (heads, -1)) for part in (query, gradient, logits, slopes)
    )
    # A head at a time: what is worked out on the way are several matrices of tokens by tokens for each query head.
    pairs = [
        _of_head(_Head(*parts), function, attends, stored)
        for parts in zip(queries, key.float(), value.float(), gradients, logits, slopes, strict=True)
    ]
    key_weights, value_weights = (torch.stack(weights) for weights in zip(*pairs, strict=True))
    return StoredReads(key_weights, queries), StoredReads(value_weights, gradients)


def what_is_read(
    tokens: int, function: ScoreFunction, sinks: int, recent: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Bool `[tokens, tokens]`: what each token attends to, and what of that it reads from storage."""
    token = torch.arange(tokens, device=device)
    distance = token[:, None] - token
    attends = distance >= 0
    if function.mask.kind == "sliding":
        attends &= distance < function.mask.size
    if function.mask.kind == "chunked":
        attends &= token[:, None] // function.mask.size == token // function.mask.size
    return attends, attends & (distance >= recent) & (token >= sinks)


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
