"""How far predictions are from the original's: not only on average, but where they are furthest.

A mean hides what breaks first. In prose most tokens are easy, and a name or a bracket that comes out wrong is one of a
thousand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# How many tokens of a window are averaged over, to see whether errors grow along it.
POSITION_BIN = 256


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence from the original's next-token distribution, in nats, over the predicted tokens.

    mean, median, largest.
    worst_percent, worst_permille: what a hundredth and a thousandth of the tokens exceed (the 99% and 99.9% quantiles).
    by_position: means over each POSITION_BIN tokens of a window, from its first on.
    """

    mean: float
    median: float
    worst_percent: float
    worst_permille: float
    largest: float
    by_position: tuple[float, ...]


@dataclass(frozen=True)
class Reference:
    """What the original predicts of a chunk, `[tokens, vocabulary]` each but the last, `[tokens]`."""

    log_probabilities: Tensor
    probabilities: Tensor
    most_likely: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Reference:
        """Of the original's logits `[tokens, vocabulary]`."""
        log_probabilities = logits.float().log_softmax(-1)
        return cls(log_probabilities, log_probabilities.exp(), log_probabilities.argmax(-1))


class Predictions:
    """Next-token distributions beside the original's, as they come, of so many tokens in all.

    What is kept has its place from the start. Small tensors made between the logits of one chunk and the next would
    leave gaps that the next ones do not fit into: gigabytes of them after a thousand chunks.

    loss: cross-entropy in nats, summed.
    """

    def __init__(self, tokens: int) -> None:
        self._divergences, self._changes = torch.empty(tokens), torch.empty(tokens)
        self._positions = torch.empty(tokens, dtype=torch.int64)
        self._tokens = self._agreed = 0
        self.loss = 0.0

    def add(self, logits: Tensor, original: Reference, targets: Tensor, position: int) -> None:
        """Take in the logits `[tokens, vocabulary]` that a model gave where the original gave others, of targets int64
        `[tokens]`. position: that of the first one in its window.
        """
        predicted = logits.float().log_softmax(-1)
        here = slice(self._tokens, self._tokens + targets.numel())
        self._tokens = here.stop
        self._positions[here] = torch.arange(position, position + targets.numel())
        self._agreed += int((predicted.argmax(-1) == original.most_likely).sum())
        of_targets, expected = (
            side.gather(-1, targets[:, None]).flatten() for side in (predicted, original.log_probabilities)
        )
        self.loss -= of_targets.sum().item()
        self._changes[here] = of_targets.exp() - expected.exp()
        differences = torch.sub(original.log_probabilities, predicted, out=predicted)
        # Rounding leaves the divergence of two equal distributions a little below zero.
        self._divergences[here] = differences.mul_(original.probabilities).sum(-1).clamp_(min=0)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self._tokens)

    @property
    def agreement(self) -> float:
        """Share of the tokens where the most likely next token is the original's."""
        return self._agreed / self._tokens

    @property
    def probability_change(self) -> float:
        """Root of the mean square by which the probability of the token that follows differs."""
        return self._changes[: self._tokens].square().mean().sqrt().item()

    def divergence(self) -> Divergence:
        """Of all that was taken in."""
        found, bins = self._divergences[: self._tokens].double(), self._positions[: self._tokens] // POSITION_BIN
        median, percent, permille = found.quantile(found.new_tensor([0.5, 0.99, 0.999])).tolist()
        return Divergence(
            mean=found.mean().item(),
            median=median,
            worst_percent=percent,
            worst_permille=permille,
            largest=found.max().item(),
            by_position=tuple(found[bins == number].mean().item() for number in range(int(bins.max()) + 1)),
        )
