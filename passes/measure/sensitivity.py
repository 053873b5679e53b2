"""Sensitivity: the precisions to choose from, and what each would lose."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from kvmix_compile.kernels.format.packing import dequantize_block, quantize_block
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, CHANNEL_MULTIPLE, TIERS, Axis, Precision
from kvmix_compile.passes.allocate.policies import PUBLISHED_GROUP
from kvmix_compile.passes.capture.ranks import Ranks
from kvmix_compile.passes.measure.exponents import check_finite, exponents_of, largest_of
from kvmix_compile.passes.measure.read_again import KeyReaders
from kvmix_compile.passes.measure.stored_reads import JointReads, StoredReads
from kvmix_compile.passes.rewrite.powers import powers_of_two

# What fisher chooses from. 4-bit scales cost SmolLM2-135M 0.1 of perplexity and save 0.7 bits an element.
CANDIDATE_BITS = (1, 2, 3, 4, 8)
# Bits of the tiers of the channels of keys whose channels are not all kept alike. Some channels matter far more than
# others, and which ones hardly changes from text to text. Of the 65 that there are these suffice: with the first eleven
# the predicted loss of SmolLM2-135M is within 2% at each of eight budgets. The others are halves, for heads whose
# quarters cannot be packed.
CANDIDATE_TIERS = (
    (2, 1, 1, 1), (3, 2, 1, 1), (4, 2, 1, 1), (4, 2, 2, 1), (4, 3, 1, 1), (4, 3, 2, 2), (8, 4, 1, 1), (8, 4, 2, 1),
    (8, 4, 3, 2), (8, 4, 3, 3), (8, 4, 4, 4), (2, 2, 1, 1), (3, 3, 2, 2), (4, 4, 2, 2), (4, 4, 3, 3), (8, 8, 4, 4),
)  # fmt: skip
# Small groups are cheap with 4-bit scales: 0.5 bits an element in groups of 16, 0.28 in groups of 32. Keys cannot have
# larger groups than a block has tokens. At 8 bits the group hardly matters.
KEY_GROUPS = (16, 32)
VALUE_GROUPS = (16, 32, 64)
CANDIDATE_SCALE_BITS = 4
# Errors of so many bits are small: what they lose is what the first order says, within the scatter of few readers (0.04
# to 1.7 times in SmolLM2-135M and in models of random weights). Where it is this many times as much, softmax is
# saturated, and the first order says nothing at any number of bits.
SMALL_ERRORS = (4, 8)
SATURATED = 4


@dataclass
class Tally:
    """Sums over calibration rows for the keys or the values of one site."""

    candidates: tuple[Precision, ...]
    axis: Axis
    gradient_norm: float = 0.0
    # The magnitude of each head's largest element that is quantized, [heads].
    largest: Tensor | None = None
    # Of each candidate, what each channel of each head loses: [heads, dim].
    sensitivity: dict[Precision, Tensor] = field(default_factory=dict)
    # By bits, what the finest candidate of so many loses where it is read again.
    read_again: dict[int, float] = field(default_factory=dict)

    def add(
        self,
        values: Tensor,
        reads: StoredReads | JointReads,
        sinks: int,
        predictions: int,
        readers: KeyReaders | None = None,
    ) -> None:
        """Add one row: `values` `[kv_heads, tokens, dim]`, of which the first `sinks` tokens are not quantized, and how
        what is stored of them is read; the loss is the sum of so many `predictions`. readers: of what is scored.
        """
        heads, tokens, dim = values.shape
        blocks = max(1, (tokens - sinks) // BLOCK_TOKENS)
        # Blocks begin behind the sinks, as in the cache. What is left over is recent, and read by nobody from storage.
        first = min(sinks, tokens - blocks * BLOCK_TOKENS)
        quantized = slice(first, first + blocks * BLOCK_TOKENS)
        largest = largest_of(values[:, quantized])
        self.largest = largest if self.largest is None else self.largest.maximum(largest)
        powers = powers_of_two(exponents_of(largest) or [0] * heads, 1, reads.vectors).view(heads, 1, 1, 1)
        original = values[:, quantized].reshape(heads, blocks, BLOCK_TOKENS, dim).float() / powers
        again = self.finest if readers is not None else ()
        for candidate in self.candidates:
            loss = original.new_zeros(heads, dim, dtype=torch.float64)
            if candidate.is_quantized:
                packed = quantize_block(original, candidate, self.axis)
                error = (dequantize_block(packed, candidate, self.axis, dim, torch.float32) - original) * powers
                # Added up before it is squared: errors that are alike in many tokens add up in attention too. Those of
                # different reading tokens meet in different predictions.
                changes = reads.changes(error.flatten(1, 2), quantized)
                loss = 0.5 * changes.double().square().sum((1, 2)) / predictions
                if readers is not None and candidate in again:
                    lost = readers.loss(error.flatten(1, 2), quantized)
                    self.read_again[candidate.bits] = self.read_again.get(candidate.bits, 0.0) + lost
            self.sensitivity[candidate] = self.sensitivity.get(candidate, 0) + loss

    def join(self, heads: Ranks, readers: Ranks) -> None:
        """Make this the tally of the heads of all ranks, and of all queries that read them: what both are spread over;
        one rank, where each has all of them.
        """
        if readers.count == 1:
            return
        if self.largest is not None:
            self.largest = heads.joined(self.largest)
        if self.sensitivity:
            lost = torch.stack(list(self.sensitivity.values()), dim=1)
            lost = readers.sum(lost) if heads.count == 1 else heads.joined(lost)
            self.sensitivity = dict(zip(self.sensitivity, lost.unbind(1), strict=True))
        of_ranks = readers.told(self.read_again)
        self.read_again = {bits: sum(lost[bits] for lost in of_ranks) for bits in self.read_again}

    @property
    def finest(self) -> tuple[Precision, ...]:
        """Of each number of bits, the candidate with the smallest groups: those that are read again."""
        finest: dict[int, Precision] = {}
        for candidate in sorted(self.candidates, key=lambda candidate: -candidate.group):
            finest[candidate.bits] = candidate
        return tuple(finest.values())

    def where_saturated(self, losses: Mapping[Precision, float], rows: int) -> dict[Precision, float]:
        """The losses, a mean over so many rows; where softmax is saturated, instead those of reading again, none
        smaller than it was. Of channels with different bits, a mean.
        """
        first_order = {candidate.bits: self.sensitivity[candidate].sum().item() for candidate in self.finest}
        if not any(self.read_again.get(bits, 0.0) > SATURATED * first_order.get(bits, 0.0) for bits in SMALL_ERRORS):
            return dict(losses)
        return {
            precision: max(loss, sum(map(self.read_again.__getitem__, precision.tiers)) / TIERS / rows)
            if precision.is_quantized
            else loss
            for precision, loss in losses.items()
        }

    def exponents(self) -> tuple[int, ...]:
        """By which power of two each head is to be divided; see passes.measure.exponents."""
        return () if self.largest is None else exponents_of(self.largest)

    def check_elements(self, what: str, layer: str) -> None:
        """Raise UnsupportedModelError, naming the layer, where the elements are not finite."""
        if self.largest is not None:
            check_finite(self.largest, f"its {what}", layer)

    def check_losses(self, what: str, layer: str) -> None:
        """Raise UnsupportedModelError, naming the layer, where what their errors cost is not finite."""
        for loss in self.sensitivity.values():
            check_finite(loss, f"gradients of the loss with respect to its {what}", layer)

    def losses(self, rows: int) -> dict[Precision, float]:
        """The mean over so many rows of what each candidate loses."""
        return {candidate: loss.sum().item() / rows for candidate, loss in self.sensitivity.items()}

    def tiers(self) -> Tensor:
        """The tier, 0 to 3, of each channel of each head, int64 `[heads, dim]`; 0 for the channels that would lose
        most at the poorest candidate.
        """
        poorest = max(self.sensitivity.values(), key=lambda loss: loss.sum().item())
        ranks = poorest.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return ranks * TIERS // poorest.shape[-1]

    def losses_of_tiers(self, tiers: Tensor, rows: int) -> dict[Precision, float]:
        """As losses, of candidates that have more bits in some tiers of the channels."""
        of_tier = {
            candidate: [loss[tiers == tier].sum().item() / rows for tier in range(TIERS)]
            for candidate, loss in self.sensitivity.items()
        }
        losses = {}
        groups = {candidate.group for candidate in self.candidates}
        for bits, group in product(CANDIDATE_TIERS, groups):
            candidate = Precision.of_tiers(bits, group, CANDIDATE_SCALE_BITS)
            alike = [Precision(number, group, CANDIDATE_SCALE_BITS) for number in bits]
            if candidate.fits(tiers.shape[-1], Axis.TOKENS) and all(part in of_tier for part in alike):
                losses[candidate] = sum(of_tier[part][tier] for tier, part in enumerate(alike))
        return losses


def candidates_for(dim: int, axis: Axis) -> tuple[Precision, ...]:
    """The precisions to choose from for keys or values with `dim` elements a head, 16 bits included.

    Those alone where `dim` is no multiple of 8, which cannot be packed.
    """
    if dim % CHANNEL_MULTIPLE:
        return (Precision(16),)
    groups = [group for group in (KEY_GROUPS if axis == Axis.TOKENS else VALUE_GROUPS) if _fits(group, dim, axis)]
    groups = groups or [max(group for group in range(1, PUBLISHED_GROUP + 1) if dim % group == 0)]
    usual = max(group for group in groups if group <= PUBLISHED_GROUP)
    quantized = tuple(
        Precision(bits, group, CANDIDATE_SCALE_BITS)
        for bits in CANDIDATE_BITS
        for group in groups
        if bits < 8 or group == usual
    )
    return (*quantized, Precision(16))


def _fits(group: int, dim: int, axis: Axis) -> bool:
    return axis == Axis.TOKENS or dim % group == 0
