"""Stored gradients: how the loss changes with the keys and values that are read from the cache in quantized form.

Attention reads a key or value many times: by the tokens right behind it while it is still in full precision, and by all
later ones as it is stored. Only the reads from storage see the quantization error, so only their part of the gradient
counts. It follows from the gradient of attention's output alone (FlashAttention, arXiv 2205.14135, appendix B.2), with
everything but the reads from storage masked out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvmix_compile.passes.match.masks import ScoreFunction


def stored_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    function: ScoreFunction,
    sinks: int,
    recent: int,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the stored keys and values of one row.

    `query` `[query heads, tokens, key_dim]`, `key` `[kv_heads, tokens, key_dim]`, `value` `[kv_heads, tokens,
    value_dim]`; `gradient` `[query heads, tokens, value_dim]`, that with respect to attention's output. A token
    is read from storage by those at least `recent` tokens behind it, the first `sinks` tokens never. `sink_logits`
    `[query heads]`: scores without values.
    Returns float32 of the shapes of `key` and `value`.
    """
    heads = key.shape[0]
    attends, stored = _reads(key.shape[1], function, sinks, recent, key.device)
    slopes = query.new_tensor(function.slopes or (0.0,), dtype=torch.float32).expand(len(query))
    # Without any, minus infinity takes no part in a softmax.
    logits = query.new_full((len(query),), -torch.inf) if sink_logits is None else sink_logits
    queries, gradients, logits, slopes = (
        part.float().unflatten(0, (heads, -1)) for part in (query, gradient, logits, slopes)
    )
    # A head at a time: its weights are a matrix of tokens by tokens for each query head.
    pairs = [
        _of_head(_Head(*parts), function, attends, stored)
        for parts in zip(queries, key.float(), value.float(), gradients, logits, slopes, strict=True)
    ]
    key_gradients, value_gradients = zip(*pairs, strict=True)
    return torch.stack(key_gradients), torch.stack(value_gradients)


def _reads(
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
    query, key, gradient = head.query, head.key, head.gradient
    scores = query @ key.T * function.scale
    bend = torch.ones_like(scores)
    if function.softcap:
        capped = torch.tanh(scores / function.softcap)
        scores, bend = capped * function.softcap, 1 - capped.square()
    token = torch.arange(len(key), device=key.device)
    scores = scores + head.slopes[:, None, None] * (token - token[:, None])
    sink = head.sink_logits[:, None, None].expand(-1, len(key), 1)
    weights = torch.cat([scores.masked_fill(~attends, -torch.inf), sink], dim=-1).softmax(-1)[..., :-1]
    mean = (gradient * (weights @ head.value)).sum(-1, keepdim=True)
    weights_read = weights * stored
    score_gradients = weights_read * (gradient @ head.value.T - mean) * bend
    key_gradient = (score_gradients.mT @ query).sum(0) * function.scale
    return key_gradient, (weights_read.mT @ gradient).sum(0)
