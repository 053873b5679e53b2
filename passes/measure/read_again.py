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

from kvmix_compile.passes.measure.stored_reads import RowAttention, attention_weights

# Of each row. With eight rows of calibration these are 128 readings of every head.
READERS = 16


@dataclass(frozen=True)
class KeyReaders:
    """Some of the tokens of a row that read keys from storage.

    row: the row that they are of.
    readers: their numbers in it, int64 `[readers]`.
    channels: those of a key that have errors; None: all. turned: what an error is multiplied by to be one of these.
    """

    row: RowAttention
    readers: Tensor
    channels: slice | None = None
    turned: Tensor | None = None

    @classmethod
    def of(cls, row: RowAttention, channels: slice | None = None, turned: Tensor | None = None) -> KeyReaders:
        """READERS of them at most, evenly spread."""
        tokens = row.key.shape[1]
        first = min(row.sinks + row.recent, tokens - 1)
        readers = torch.linspace(first, tokens - 1, min(READERS, tokens - first), device=row.key.device)
        return cls(row, readers.round().long(), channels, turned)

    def loss(self, error: Tensor, tokens: slice) -> float:
        """Half the mean over the readers of the squared change of the loss, to first order in what attention gives,
        where these tokens' keys have an error `[kv_heads, n, channels]`.
        """
        wrong = torch.zeros_like(self.row.key, dtype=torch.float32)
        wrong[:, tokens, self.channels or slice(None)] = error if self.turned is None else error @ self.turned
        attends, stored = self._what_is_read
        scores, weights, gains = self._without_errors
        changed = torch.where(stored, scores + self._scores(wrong), scores)
        changes = ((self._weights(changed, attends) - weights) * gains).sum(-1).double()
        return 0.5 * changes.square().sum().item() / len(self.readers)

    # The same for every error.

    @cached_property
    def _query(self) -> Tensor:
        return self.row.by_key_head(self.row.query[:, self.readers])

    @cached_property
    def _what_is_read(self) -> tuple[Tensor, Tensor]:
        attends, stored = self.row.what_is_read
        return attends[self.readers], stored[self.readers]

    @cached_property
    def _without_errors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and weights as they are, and what each token's value does to the loss for its weight."""
        row, (attends, _) = self.row, self._what_is_read
        scores = self._scores(row.key.float())
        gains = row.by_key_head(row.gradient[:, self.readers]) @ row.value.float().mT[:, None]
        return scores, self._weights(scores, attends), gains

    def _scores(self, key: Tensor) -> Tensor:
        return self._query @ key[:, None].mT * self.row.function.scale

    def _weights(self, scores: Tensor, attends: Tensor) -> Tensor:
        distance = torch.arange(scores.shape[-1], device=scores.device) - self.readers[:, None]
        row = self.row
        return attention_weights(scores, row.function, row.slopes, row.sink_logits_of_heads, distance, attends)
