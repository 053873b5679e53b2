"""Padding: what the masks of a call say about its rows, checked against what the operators will do.

The operators know causal attention, a sliding window, and padding that leads a row. A mask, whether the model computes
it or `generate` passes it in, has to come out as just that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvmix_compile.errors import CacheError
from kvmix_compile.passes.capture.dynamo import Lowered
from kvmix_compile.passes.capture.sizes import size_reader
from kvmix_compile.passes.graph.subgraph import subgraph
from kvmix_compile.passes.match.masks import unbiased
from kvmix_compile.passes.match.static_cache import CachedSite
from kvmix_compile.runtime.padding import ADVICE


@dataclass(frozen=True)
class SeenMask:
    """What a mask allows in one call: boolean or additive `[batch or 1, heads or 1, tokens, slots]`.

    `past_is_indexed`: its slots count from the first token of all; else they end with the new tokens. `window`: 0 for
    none.
    """

    layer: str
    values: Tensor
    past_is_indexed: bool
    window: int

    def allowed(self, batch: int) -> Tensor:
        """Boolean `[batch, tokens, slots]`. Raises UnsupportedModelError for a mask that does more."""
        allowed = unbiased(self.values, self.layer)
        by_head = allowed.reshape(-1, *allowed.shape[-3:]) if allowed.dim() >= 3 else allowed[None, None]
        if not torch.equal(by_head, by_head[:, :1].expand_as(by_head)):
            raise _not_understood(self.layer, "its heads have different masks")
        return by_head[:, 0].expand(batch, -1, -1)


class MaskReader:
    """The distinct masks of a graph's sites, computed from its inputs without running the rest of it."""

    def __init__(self, lowered: Lowered, sites: Sequence[CachedSite]) -> None:
        distinct: dict[tuple[frozenset[fx.Node], bool, int], CachedSite] = {}
        for cached in sites:
            if cached.mask is not None:
                key = (cached.sides, cached.key.form == "indexed", cached.site.mask.size)
                distinct.setdefault(key, cached)
        self._readers = [_reader(lowered, cached) for cached in distinct.values()]

    def read(self, inputs: Sequence[Any]) -> list[SeenMask]:
        return [read(inputs) for read in self._readers]


def _reader(lowered: Lowered, cached: CachedSite) -> Callable[[Sequence[Any]], SeenMask]:
    assert cached.mask is not None
    layer, is_indexed, window = cached.site.layer, cached.key.form == "indexed", cached.site.mask.size
    scores = [] if cached.scores is None else [cached.scores]
    module = subgraph(lowered.module, [cached.mask], scores)
    zeros = [_zeros_like(node.meta["val"], lowered) for node in scores]

    def read(inputs: Sequence[Any]) -> SeenMask:
        (values,) = module(*inputs, *(zero(inputs) for zero in zeros))
        return SeenMask(layer, values, is_indexed, window)

    return read


def _zeros_like(scores: Tensor, lowered: Lowered) -> Callable[[Sequence[Any]], Tensor]:
    """Scores of zero for one row and one head, of the tokens and slots at hand."""
    sizes = [size_reader(size, lowered) for size in scores.shape[-2:]]
    outer, dtype, device = (1,) * (scores.dim() - 2), scores.dtype, scores.device
    return lambda inputs: torch.zeros(*outer, *(size(inputs) for size in sizes), dtype=dtype, device=device)


def padding(masks: Sequence[SeenMask], batch: int, tokens: int, seen: int, lengths: Tensor | None) -> Tensor:
    """How many positions of each row, of those seen and those to come, are padding; int64 `[batch]`.

    `seen`: positions before this call; `lengths` int64 `[batch]`: the tokens among them, None where only the masks can
    tell. Raises CacheError for a mask that is not causal, or not with that window, or has padding behind tokens.
    """
    total: Tensor | None = None if lengths is None else seen - lengths
    # A mask without a window shows the padding of the whole past.
    for mask in sorted(masks, key=lambda mask: mask.window > 0):
        allowed = mask.allowed(batch)
        device, columns = allowed.device, allowed.shape[-1]
        if mask.past_is_indexed and columns < seen + tokens:
            raise _not_understood(mask.layer, f"it covers {columns} of {seen + tokens} tokens")
        query = torch.arange(seen, seen + tokens, device=device)[:, None]
        slot = torch.arange(columns, device=device) + (0 if mask.past_is_indexed else seen + tokens - columns)
        visible = (slot <= query) & (slot >= 0)
        if mask.window:
            visible &= slot > query - mask.window
        total = _padded(allowed, visible, query, slot, seen, None if total is None else total.to(device))
        expected = visible & (slot >= total[:, None, None])
        # What a padding token itself attends to does not matter.
        wrong = (allowed != expected) & (query >= total[:, None, None])
        if bool(wrong.any()):
            raise _not_understood(mask.layer, f"in a call of {tokens} tokens after {seen}")
    return torch.zeros(batch, dtype=torch.int64) if total is None else total


def _padded(allowed: Tensor, visible: Tensor, query: Tensor, slot: Tensor, seen: int, known: Tensor | None) -> Tensor:
    """The padding that a mask shows. A new token that may not attend to itself is padding; of earlier ones those are
    that the first new token could see and may not.
    """
    own = (allowed & (slot == query)).any(-1)
    new = (~own).sum(-1)
    if known is None:
        past = visible[0] & (slot < seen)
        leading = ((~allowed[:, 0] | ~past).cumprod(-1).bool() & past).sum(-1)
        known = torch.where(leading > 0, leading + slot[past].amin(), 0) if bool(past.any()) else torch.zeros_like(new)
    return torch.where(new > 0, seen + new, known)


def _not_understood(layer: str, where: str) -> CacheError:
    return CacheError(
        f"{layer}: the attention mask ({where}) is neither causal nor the window that its StaticCache keeps, over a "
        "row that padding leads: keep the mask of earlier calls and pass no other, where the model itself attends in "
        f"chunks or another window use kvmix_compile.apply, and {ADVICE}"
    )
