"""How the scores of attention become weights: what attend knows beside causal attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from kvmix_compile.kernels.errors import KVMixError

Number = TypeVar("Number", int, Tensor)


@dataclass(frozen=True, eq=False)
class Weighting:
    """Token number t attends to the tokens u from first_visible(t) to t, with weights ``softmax(scale * q . k)``.

    softcap: c makes scores ``c * tanh(scale * q . k / c)``; 0: none.
    sliding_window: w lets a token see itself and the w - 1 before it; 0: all.
    attention_chunk: c lets it see those of its own chunk, whose numbers over c have the same quotient; 0: all.
    sink_logits: [query heads], of each a score that takes part in the softmax and has no value (gpt-oss).
    slopes: [query heads], of each an s that adds ``s * (u - t)`` to the capped score (ALiBi, arXiv:2108.12409).
    """

    scale: float
    softcap: float = 0.0
    sliding_window: int = 0
    attention_chunk: int = 0
    sink_logits: Tensor | None = None
    slopes: Tensor | None = None

    def __post_init__(self) -> None:
        if self.sliding_window and self.attention_chunk:
            raise KVMixError("attention has either a sliding window or chunks, not both")

    @property
    def is_softmax(self) -> bool:
        """Whether weights are a softmax over scaled products and nothing else, whichever tokens are seen."""
        return not self.softcap and self.sink_logits is None and self.slopes is None

    @property
    def is_limited(self) -> bool:
        """Whether some tokens of the past are not seen."""
        return self.window > 0

    @property
    def window(self) -> int:
        """The most tokens that one attends to, itself included; 0: all before it."""
        return max(self.sliding_window, self.attention_chunk)

    def first_visible(self, token: Number) -> Number:
        """The earliest token that a token attends to. token: a number, or an int64 tensor of any shape."""
        if self.sliding_window:
            first = token - self.sliding_window + 1
            return first * (first > 0)
        return token - token % self.attention_chunk if self.attention_chunk else token * 0

    def of_length(self, tokens: int) -> Weighting:
        """The same for rows of at most so many tokens, where a window or a chunk of as many is none."""
        return replace(self, sliding_window=0, attention_chunk=0) if 0 < tokens <= self.window else self
