"""Original: the model itself, called as its user calls it. What a rewritten graph gives is held against this.

Where it takes positions it is given them: how it counts where it is not is another question (numbering.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvmix_compile.passes.capture.export import logits_of
from kvmix_compile.passes.capture.signature import cache_in, cache_name, parameters_of


def whole(model: nn.Module, ids: Tensor) -> Tensor:
    """Float32 logits `[rows, tokens, vocabulary]` of `ids`, int64 `[rows, tokens]`, in one call without a cache."""
    options = {"use_cache": False} if "use_cache" in parameters_of(model.forward) else {}
    return logits_of(model(ids, **options, **_positions(model, ids, 0))).float()


def in_chunks(model: nn.Module, ids: Tensor, chunks: Sequence[int]) -> Tensor | None:
    """The same read in chunks of these sizes, the model's own cache between them; None where it keeps none."""
    name = cache_name(model.forward)
    if not {"use_cache", name} <= set(parameters_of(model.forward)):
        return None
    held: dict[str, Any] = {}
    logits, seen = [], 0
    for part in ids.split(list(chunks), dim=1):
        output = model(part, use_cache=True, **held, **_positions(model, part, seen))
        seen += part.shape[1]
        if (cache := cache_in(output)) is None:
            return None
        held = {name: cache}
        logits.append(logits_of(output).float())
    return torch.cat(logits, dim=1)


def _positions(model: nn.Module, ids: Tensor, seen: int) -> dict[str, Tensor]:
    """The argument `position_ids` for tokens that follow `seen` others, where the model takes it."""
    if "position_ids" not in parameters_of(model.forward):
        return {}
    return {"position_ids": torch.arange(seen, seen + ids.shape[1], device=ids.device).expand_as(ids).contiguous()}
