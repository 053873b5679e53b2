"""Perplexity through the cache: every prediction is made from keys and values that were written to the cache
and read back.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from kvmix_compile.cache import KVMixCache
from kvmix_compile.errors import InputError
from kvmix_compile.model import CompiledModel
from kvmix_compile.progress import progress_bar

# The protocol of the reference numbers: windows of 2048 tokens, read in chunks of 64.
WINDOW = 2048
CHUNK = 64


@torch.no_grad()
def perplexity(
    model: nn.Module,
    ids: Tensor,
    chunk: int = CHUNK,
    window: int = WINDOW,
    progress: bool = False,
    new_cache: Any = None,
) -> float:
    """exp of the mean next-token cross-entropy of `ids`, int64 `[tokens]` or `[1, tokens]`.

    The text is cut into independent windows of `window` tokens, each read in chunks of `chunk`: a chunk attends to
    the past as the cache holds it. Works for a compiled model (KVMixCache) and, as a baseline, for a transformers
    model (DynamicCache, or what `new_cache()` makes).

    Raises:
        InputError: fewer than two tokens, or a chunk that holds a whole window, so that the cache would never be read.
    """
    ids = ids.flatten()
    if ids.numel() < 2:
        raise InputError("perplexity needs at least two tokens")
    if not 0 < chunk < window:
        raise InputError(
            f"chunk ({chunk}) must be smaller than window ({window}): otherwise the cache is written but never read"
        )
    device = next(model.parameters()).device
    windows = [part for part in ids.split(window) if part.numel() > 1]
    loss, predicted = 0.0, 0
    with progress_bar("perplexity", sum(math.ceil(part.numel() / chunk) for part in windows), progress) as advance:
        for part in windows:
            cache = (
                new_cache() if new_cache else KVMixCache(model) if isinstance(model, CompiledModel) else DynamicCache()
            )
            for start in range(0, part.numel(), chunk):
                given = part[start : start + chunk].to(device)
                targets = part[start + 1 : start + chunk + 1].to(device)
                logits = model(input_ids=given[None], past_key_values=cache, use_cache=True, return_dict=True).logits
                loss += F.cross_entropy(logits[0, : targets.numel()].float(), targets, reduction="sum").item()
                predicted += targets.numel()
                advance()
    return math.exp(loss / predicted)
