"""Positions: how the tokens of a call are numbered, as given or as the original numbers them."""

import torch
from torch import Tensor

from kvmix_compile.errors import InputError
from kvmix_compile.runtime.cache import KVMixCache
from kvmix_compile.runtime.numbering import Numbering
from kvmix_compile.runtime.padding import Padding, reading_waits


def default_positions(numbering: Numbering, padding: Padding, cache: KVMixCache, tokens: int) -> Tensor:
    """What the original counts where it is given no positions, int64 `[batch, tokens]`, arranged as its tokens are.

    Raises InputError where that is not known.
    """
    starts = padding.starts
    every = torch.arange(tokens, device=starts.device)
    if not padding.there_is_some:
        if not numbering.from_zero:
            raise InputError(
                "this model does not number its tokens 0, 1, 2, .. by itself, so it has to be told: pass position_ids"
            )
        return (every + cache.seen).expand(len(starts), tokens)
    if numbering.padded is None and numbering.is_input:
        raise InputError(
            "how this model numbers the tokens of a row with padding, where it is given no position_ids, is not "
            "understood: pass position_ids"
        )
    if numbering.padded == "tokens":
        held = cache.lengths if cache.states else torch.zeros_like(starts)
        return ((held - starts)[:, None] + every).clamp(min=0)
    return padding.arrange((every + cache.seen).expand(len(starts), tokens))


def given_positions(
    position_ids: Tensor, padding: Padding, tokens: int, longest: int | None, must_follow: bool
) -> Tensor:
    """Positions that a call was given, `[batch or 1, tokens]`, as int64 `[batch, tokens]`, arranged as its tokens are.

    `longest`: the number of positions there are. `must_follow`: those of a row's tokens must be consecutive. Raises
    InputError for positions that are not, or that there are none of; the latter, as with ids, on a CPU only.
    """
    starts = padding.starts
    batch = len(starts)
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens:
        raise InputError(
            f"position_ids have the shape {list(position_ids.shape)}; they must be [batch, tokens], here "
            f"{[batch, tokens]}"
        )
    if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype is torch.bool:
        raise InputError(f"position_ids must be int64, not {position_ids.dtype}")
    positions = padding.arrange(position_ids.to(starts.device, torch.int64).expand(batch, tokens))
    every = torch.arange(tokens, device=starts.device)
    if padding.comes:  # whatever padding is numbered means nothing
        positions = positions.where(every >= starts[:, None], 0)
    if not reading_waits(starts.device):
        _check_range(positions, longest)
    if must_follow and tokens > 1:
        behind_a_token = every[1:] > starts[:, None]
        if bool(((positions.diff(dim=1) != 1) & behind_a_token).any()):
            raise InputError(
                "position_ids begin anew or jump within a row, by which the original tells several texts in a row "
                "apart (without a cache and an attention_mask): pass each text as a row of its own, padded on the left"
            )
    return positions


def count_on(positions: Tensor, numbering: Numbering, padding: Padding, cache: KVMixCache, tokens: int) -> bool:
    """Whether positions of the coming tokens, `[.., batch or 1, tokens]`, are what `default_positions` counts."""
    try:
        counted = default_positions(numbering, padding, cache, tokens)
    except InputError:
        return False
    is_token = torch.arange(tokens, device=counted.device) >= padding.starts[:, None]
    rows = positions.to(counted.device).reshape(-1, *positions.shape[-2:]).expand(-1, len(counted), -1)
    return all(bool(((padding.arrange(row) == counted) | ~is_token).all()) for row in rows)


def _check_range(positions: Tensor, longest: int | None) -> None:
    lowest, highest = (int(extreme) for extreme in positions.aminmax())
    if lowest < 0:
        raise InputError(f"position_ids must not be negative, and one is {lowest}")
    if longest is not None and highest >= longest:
        raise InputError(
            f"position_ids go up to {highest}, and the model has positions from 0 to {longest - 1}: pass lower ones"
        )
