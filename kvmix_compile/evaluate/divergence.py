"""How far predictions are from the original's: not only on average, but where they are furthest.

A mean hides what breaks first. In prose most tokens are easy, and a name or a bracket that comes out wrong is one of a
thousand.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
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


@dataclass
class Predictions:
    """Next-token distributions beside the original's, as they come.

    agreement: share of the tokens where the most likely next token is the original's.
    probability_change: root of the mean square by which the probability of the token that follows differs.
    """

    divergences: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    changes: list[Tensor] = field(default_factory=list)
    agreed: int = 0

    def add(self, predicted: Tensor, original: Tensor, targets: Tensor, position: int) -> None:
        """Take in the log-probabilities `[tokens, vocabulary]` that a model and the original gave, of targets int64
        `[tokens]`. position: that of the first one in its window.
        """
        divergences = F.kl_div(predicted, original, reduction="none", log_target=True).sum(-1)
        # Rounding leaves the divergence of two equal distributions a little below zero.
        self.divergences.append(divergences.clamp(min=0).cpu())
        self.positions.append(torch.arange(position, position + targets.numel()))
        probabilities = (side.gather(-1, targets[:, None]).exp() for side in (predicted, original))
        self.changes.append(torch.sub(*probabilities).flatten().cpu())
        self.agreed += int((predicted.argmax(-1) == original.argmax(-1)).sum())

    @property
    def agreement(self) -> float:
        return self.agreed / sum(part.numel() for part in self.divergences)

    @property
    def probability_change(self) -> float:
        return torch.cat(self.changes).square().mean().sqrt().item()

    def divergence(self) -> Divergence:
        """Of all that was taken in."""
        found = torch.cat(self.divergences).double()
        bins = torch.cat(self.positions) // POSITION_BIN
        median, percent, permille = found.quantile(found.new_tensor([0.5, 0.99, 0.999])).tolist()
        return Divergence(
            mean=found.mean().item(),
            median=median,
            worst_percent=percent,
            worst_permille=permille,
            largest=found.max().item(),
            by_position=tuple(found[bins == number].mean().item() for number in range(int(bins.max()) + 1)),
        )
