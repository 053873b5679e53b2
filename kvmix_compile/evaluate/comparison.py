"""Configurations of one model side by side: one pass over a text gives every figure of every one of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvmix_compile.errors import InputError
from kvmix_compile.evaluate.configurations import Configuration
from kvmix_compile.evaluate.divergence import Divergence, Predictions, Reference
from kvmix_compile.evaluate.perplexity import CHUNK, WINDOW, read, windowed
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.progress import progress_bar


@dataclass(frozen=True)
class Result:
    """What one configuration takes, and what it does to the model's predictions; means over the predicted tokens.

    code_bits, stored_bits: of a quantized element, without and with its share of scales and zero points.
    held_bits: of an element, averaged over everything that the cache holds at the end of the first window.
    divergence: from the original's next-token distribution.
    agreement, probability_change: as of Predictions.
    """

    configuration: str
    code_bits: float
    stored_bits: float
    held_bits: float
    perplexity: float
    divergence: Divergence
    agreement: float
    probability_change: float


def compare(
    configurations: Sequence[Configuration],
    ids: Tensor,
    chunk: int = CHUNK,
    window: int = WINDOW,
    progress: bool = False,
) -> list[Result]:
    """A result for each configuration, of which the first is the original that the others are held against.

    All of them read the text, int64 `[tokens]`, chunk by chunk and side by side, each with a cache of its own: the
    original's logits are computed once, and no more than a chunk's are in memory.

    Raises InputError for a text or window too short for anything to be quantized, or for the cache to be read.
    """
    chunks = windowed(ids, chunk, window)
    check_length(configurations, min(window, ids.numel()))
    targets = sum(piece.targets.numel() for piece in chunks)
    original, *others = [_Reader(configuration, Predictions(targets)) for configuration in configurations]
    with progress_bar("reading", len(chunks) * len(configurations), progress) as advance:
        for piece in chunks:
            reference: Reference | None = None
            for reader in (original, *others):
                if piece.opens_window:
                    reader.cache = reader.configuration.new_cache()
                logits = read(reader.configuration.model, piece.given, reader.cache)[: piece.targets.numel()]
                reference = reference or Reference.of(logits)
                reader.predictions.add(logits, reference, piece.targets.to(logits.device), piece.position)
                if piece.closes_window:
                    reader.close_window()
                advance()
    return [reader.result() for reader in (original, *others)]


def check_length(configurations: Sequence[Configuration], longest: int) -> None:
    """Raise InputError for windows of so many tokens, of which nothing would be quantized. A block is, once it has left
    the unquantized tokens; before, every figure would be the original's.
    """
    needed = max(configuration.unquantized_tokens for configuration in configurations) + BLOCK_TOKENS
    if longest <= needed:
        raise InputError(
            f"windows of {longest} tokens are too short: up to {needed} tokens are kept unquantized, so nothing would "
            "be measured. Give a longer text"
        )


@dataclass
class _Reader:
    """One configuration on its way through the text: its cache, and what it predicted so far."""

    configuration: Configuration
    predictions: Predictions
    cache: Any = None
    held_bits: float | None = None

    def close_window(self) -> None:
        if self.held_bits is None:
            self.held_bits = self.configuration.held_bits(self.cache)

    def result(self) -> Result:
        chosen = self.configuration
        return Result(
            configuration=chosen.name,
            code_bits=chosen.code_bits,
            stored_bits=chosen.stored_bits,
            held_bits=float(self.held_bits or 0.0),
            perplexity=self.predictions.perplexity,
            divergence=self.predictions.divergence(),
            agreement=self.predictions.agreement,
            probability_change=self.predictions.probability_change,
        )
