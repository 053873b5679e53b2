"""Perplexity through the cache: every prediction is made from keys and values that were written to the cache
and read back.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from kvmix_compile.errors import InputError
from kvmix_compile.passes.capture.signature import cache_name
from kvmix_compile.progress import progress_bar
from kvmix_compile.runtime.cache import KVMixCache
from kvmix_compile.runtime.model import CompiledModel

# The protocol of the reference numbers: windows of 2048 tokens, read in chunks of 64.
WINDOW = 2048
CHUNK = 64


@dataclass(frozen=True)
class Chunk:
    """Tokens that a model reads at once, int64 `[tokens]`, and those that follow each of them (`targets`: one fewer at
    the end of a window). `position`: that of the first token in its window. `closes_window`: the cache will not be
    needed again.
    """

    given: Tensor
    targets: Tensor
    position: int
    closes_window: bool

    @property
    def opens_window(self) -> bool:
        """Whether the cache is to be new."""
        return self.position == 0


def windowed(ids: Tensor, chunk: int = CHUNK, window: int = WINDOW) -> list[Chunk]:
    """A text cut into independent windows of `window` tokens, each to be read in chunks of `chunk`.

    This is the only way that text reaches a model under evaluation, and no window is a single chunk: what follows the
    first one attends to a past that comes from the cache. A remainder that one chunk could hold is left out.

    Raises InputError where nothing would be left, or a chunk would hold a window.
    """
    ids = ids.flatten()
    if ids.numel() < 2:
        raise InputError("perplexity needs at least two tokens")
    if not 0 < chunk < window:
        raise InputError(
            f"chunk ({chunk}) must be smaller than window ({window}): otherwise the cache is written but never read"
        )
    if ids.numel() <= chunk:
        raise InputError(
            f"{ids.numel()} tokens are read as one chunk of {chunk}, so the cache is never read: give a longer text "
            "or a smaller chunk"
        )
    return [piece for part in ids.split(window) if part.numel() > chunk for piece in _chunks(part, chunk)]


def _chunks(window: Tensor, chunk: int) -> Iterator[Chunk]:
    tokens = window.numel()
    for start in range(0, tokens, chunk):
        given, targets = window[start : start + chunk], window[start + 1 : start + chunk + 1]
        yield Chunk(given, targets, position=start, closes_window=start + chunk >= tokens)


@torch.no_grad()
def read(model: nn.Module, ids: Tensor, cache: Any, **options: Any) -> Tensor:
    """The logits, `[tokens, vocabulary]`, of `ids`, int64 `[tokens]`, after what `cache` holds, and in it from now on.

    `options` go to the model's forward.
    """
    return read_rows(model, ids[None], cache, **options)[0]


def read_rows(model: nn.Module, ids: Tensor, cache: Any, **options: Any) -> Tensor:
    """As read, of rows of ids: `[rows, tokens, vocabulary]` of int64 `[rows, tokens]`."""
    device = next(model.parameters()).device
    # One that torch.compile wrapped takes what the model in it takes.
    held = {cache_name(getattr(model, "_orig_mod", model).forward): cache}
    return model(input_ids=ids.to(device), use_cache=True, return_dict=True, **held, **options).logits


def new_cache_of(model: nn.Module) -> Any:
    """An empty cache of the kind that `model` uses."""
    return KVMixCache(model) if isinstance(model, CompiledModel) else DynamicCache()


def perplexity(
    model: nn.Module,
    ids: Tensor,
    chunk: int = CHUNK,
    window: int = WINDOW,
    progress: bool = False,
    new_cache: Callable[[], Any] | None = None,
) -> float:
    """exp of the mean next-token cross-entropy of `ids`, int64 `[tokens]` or `[1, tokens]`.

    The text is cut into independent windows of `window` tokens, each read in chunks of `chunk`: a chunk attends to
    the past as the cache holds it. Works for a compiled model (KVMixCache) and, as a baseline, for a transformers
    model (DynamicCache, or what `new_cache()` makes).

    Raises:
        InputError: a text no longer than a chunk, or a chunk that holds a whole window, so that the cache would never
            be read.
    """
    chunks = windowed(ids, chunk, window)
    loss, predicted = 0.0, 0
    with progress_bar("perplexity", len(chunks), progress) as advance:
        for piece in chunks:
            if piece.opens_window:
                cache = new_cache() if new_cache else new_cache_of(model)
            logits = read(model, piece.given, cache)
            loss += summed_loss(logits, piece.targets)
            predicted += piece.targets.numel()
            advance()
    return math.exp(loss / predicted)


def summed_loss(logits: Tensor, targets: Tensor) -> float:
    """Cross-entropy in nats of `targets`, int64 `[predictions]`, summed; `logits` `[at least predictions,
    vocabulary]`.
    """
    targets = targets.to(logits.device)
    return F.cross_entropy(logits[: targets.numel()].float(), targets, reduction="sum").item()
