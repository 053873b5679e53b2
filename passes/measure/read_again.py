"""Read again: what errors of stored keys lose where attention reads them with the errors in them, softmax and all.

stored_reads tells how the loss changes to first order. Errors of values only ever enter a sum, but those of keys an
exponential: where scores are so large that each token sees one other alone, the first order is nothing at all, while
errors move what it sees to another token altogether. So some tokens of each row read their keys twice, without errors
and with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvmix_compile.passes.match.masks import ScoreFunction
from kvmix_compile.passes.measure.stored_reads import attention_weights, what_is_read

# Of each row. With eight rows of calibration these are 128 readings of every head.
READERS = 16


@dataclass(frozen=True)
class KeyReaders:
    """Some of the tokens of a row that read keys from storage.

    readers: their numbers in the row, int64 `[readers]`.
    query, gradient: theirs, float32 `[kv_heads, query heads of each, readers, key_dim or value_dim]`.
    key, value: of the whole row, float32 `[kv_heads, tokens, dim]`.
    sink_logits: float32 `[kv_heads, query heads of each]`.
    The rest is as stored_reads takes it.
    """

    readers: Tensor
    query: Tensor
    gradient: Tensor
    key: Tensor
    value: Tensor
    function: ScoreFunction
    sinks: int
    recent: int
    sink_logits: Tensor

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gradient: Tensor,
        function: ScoreFunction,
        sinks: int,
        recent: int,
        sink_logits: Tensor | None = None,
    ) -> KeyReaders:
        """READERS of them at most, evenly spread over a row given as to stored_reads."""
        heads, tokens, _ = key.shape
        first = min(sinks + recent, tokens - 1)
        readers = torch.linspace(first, tokens - 1, min(READERS, tokens - first), device=key.device).round().long()
        logits = query.new_full((len(query),), -torch.inf) if sink_logits is None else sink_logits
        query, gradient, logits = (
            part.float().unflatten(0, (heads, -1)) for part in (query[:, readers], gradient[:, readers], logits)
        )
        return cls(readers, query, gradient, key.float(), value.float(), function, sinks, recent, logits)

    def loss(self, error: Tensor, tokens: slice) -> float:
        """Half the mean over the readers of the squared change of the loss, to first order in what attention gives,
        where these tokens' keys have an error `[kv_heads, n, key_dim]`.
        """
        wrong = torch.zeros_like(self.key)
        wrong[:, tokens] = error
        attends, stored = self._what_is_read
        scores, weights, gains = self._without_errors
        changed = torch.where(stored, scores + self._scores(wrong), scores)
        changes = ((self._weights(changed, attends) - weights) * gains).sum(-1).double()
        return 0.5 * changes.square().sum().item() / len(self.readers)

    # The same for every error.

    @cached_property
    def _what_is_read(self) -> tuple[Tensor, Tensor]:
        both = what_is_read(self.key.shape[1], self.function, self.sinks, self.recent, self.key.device)
        attends, stored = (part[self.readers] for part in both)
        return attends, stored

    @cached_property
    def _without_errors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and weights as they are, and what each token's value does to the loss for its weight."""
        scores, (attends, _) = self._scores(self.key), self._what_is_read
        return scores, self._weights(scores, attends), self.gradient @ self.value.mT[:, None]

    def _scores(self, key: Tensor) -> Tensor:
        return self.query @ key[:, None].mT * self.function.scale

    def _weights(self, scores: Tensor, attends: Tensor) -> Tensor:
        heads = self.query.shape[:2]
        slopes = scores.new_tensor(self.function.slopes or (0.0,)).expand(heads.numel()).view(heads)
        distance = torch.arange(scores.shape[-1], device=scores.device) - self.readers[:, None]
        return attention_weights(scores, self.function, slopes, self.sink_logits, distance, attends)
