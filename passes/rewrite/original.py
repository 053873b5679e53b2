"""Original: the model itself, called as its user calls it. What a rewritten graph gives is held against this.

Where it takes positions it is given them: how it counts where it is not is another question (numbering.py).
"""

from collections.abc import Iterator, Mapping, Sequence
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


# Tokens of two texts, longer than what a convolution holds of one, and so short that few windows forget any of them.
SHORT_TEXT, LONGER_TEXT = 8, 12


@torch.no_grad()
def cache_bytes(model: nn.Module, ids: Tensor) -> float | None:
    """Bytes that the model's own cache takes for each further token of a row, seen on the first ones of `ids`, int64
    `[1, LONGER_TEXT]`; None where it keeps none, or cannot be called so.
    """
    if not {"use_cache", cache_name(model.forward)} <= set(parameters_of(model.forward)):
        return None
    held = []
    for tokens in (SHORT_TEXT, LONGER_TEXT):
        text = ids[:, :tokens]
        try:
            cache = cache_in(model(text, use_cache=True, **_positions(model, text, 0)))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError):
            return None
        held.append(sum(tensor.nbytes for tensor in _tensors_in(cache, set())))
    return (held[1] - held[0]) / (LONGER_TEXT - SHORT_TEXT) or None


def _tensors_in(held: object, seen: set[int]) -> Iterator[Tensor]:
    """The floating-point tensors of an object, of its attributes, and of what these hold, each once."""
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        if held.is_floating_point():
            yield held
        return
    if isinstance(held, nn.Module):
        return
    parts = held.values() if isinstance(held, Mapping) else held if isinstance(held, list | tuple) else ()
    for part in (*parts, *getattr(held, "__dict__", {}).values()):
        yield from _tensors_in(part, seen)


def _positions(model: nn.Module, ids: Tensor, seen: int) -> dict[str, Tensor]:
    """The argument `position_ids` for tokens that follow `seen` others, where the model takes it."""
    if "position_ids" not in parameters_of(model.forward):
        return {}
    return {"position_ids": torch.arange(seen, seen + ids.shape[1], device=ids.device).expand_as(ids).contiguous()}
