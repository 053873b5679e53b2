"""A step of vLLM's: the rows of a batch, in the order in which they can be written and read.

vLLM lays the tokens of all rows one behind the other, some rows with one token and some with a chunk of a prompt. Rows
of one token are worked on together, others each on their own.

What a row reads of its past may be written in the same step: a request that begins with another's text takes over its
pages when they are promised, not when they are filled. So all rows are written before any is read, and a row that may
have taken over pages after whatever is shorter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvmix_compile.kernels.chunk import Chunk


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of a step with equally many tokens each.

    first, end: which of the step's rows. token: the first of their tokens in the step. tokens: of each row.
    lengths: int64 [rows], what each holds before. starts: int64 [rows], zeros.
    held: the same as lengths, on the host, of the first row.
    """

    first: int
    end: int
    token: int
    tokens: int
    held: int
    lengths: Tensor
    starts: Tensor

    @property
    def slice(self) -> slice:
        """Of the step's tokens."""
        return slice(self.token, self.token + (self.end - self.first) * self.tokens)

    def of(self, flat: Tensor) -> Tensor:
        """Theirs of [tokens, heads, dim], as [rows, heads, tokens of each, dim]."""
        return flat[self.slice].unflatten(0, (-1, self.tokens)).transpose(1, 2)

    def chunk(self, key: Tensor, value: Tensor) -> Chunk:
        """Theirs of keys and values [tokens, heads, dim]."""
        return Chunk(key=self.of(key), value=self.of(value), lengths=self.lengths, starts=self.starts)


@dataclass(frozen=True)
class Step:
    """written, read: the rows of a step, each in their order."""

    written: tuple[Rows, ...]
    read: tuple[Rows, ...]

    @classmethod
    def of(cls, tokens: Sequence[int], held: Sequence[int], lengths: Tensor, shared_at: int) -> Step:
        """tokens: of each row in this step. held: before it. lengths: the same, int64 on the device. shared_at: rows
        take over pages of others where this divides what they hold.
        """
        lines = list(_lines(tokens, held, lengths, shared_at))
        alone = [line for line, may_follow in lines if not may_follow]
        following = sorted((line for line, may_follow in lines if may_follow), key=lambda line: line.held)
        return cls(written=(*alone, *following), read=tuple(line for line, _ in lines))


def _lines(tokens: Sequence[int], held: Sequence[int], lengths: Tensor, shared_at: int) -> Iterator[tuple[Rows, bool]]:
    """The rows of a step, and whether they may have taken over pages that others fill in it."""
    starts = torch.zeros_like(lengths)
    follows = [length > 0 and length % shared_at == 0 for length in held]
    row = token = 0
    while row < len(tokens):
        end = row + 1
        while end < len(tokens) and tokens[row] == tokens[end] == 1 and not (follows[row] or follows[end]):
            end += 1
        if tokens[row]:
            yield Rows(row, end, token, tokens[row], held[row], lengths[row:end], starts[row:end]), follows[row]
        token += sum(tokens[row:end])
        row = end
