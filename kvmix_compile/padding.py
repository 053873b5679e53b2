"""Padding: what an attention mask says of the rows of a batch, and whether it can be."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvmix_compile.cache import KVMixCache
from kvmix_compile.errors import CacheError
from kvmix_compile.kernels.precision import BLOCK_TOKENS


@dataclass(frozen=True)
class Padding:
    """starts: how many of the coming tokens are padding at the beginning of each row, int64 `[batch]`.
    every_row_has_tokens: after them, no row consists of padding only.
    """

    starts: Tensor
    every_row_has_tokens: bool


def read_padding(
    attention_mask: Tensor | None, cache: KVMixCache, batch: int, tokens: int, device: torch.device
) -> Padding:
    """What the mask says of the coming `tokens`.

    `attention_mask`: 1 for tokens and 0 for padding, `[batch, tokens seen + tokens]` or `[batch, tokens]`.
    Raises CacheError for padding anywhere but at the beginning of a row. On a CPU that is before anything is changed.
    On a GPU the mask of rows that decode is looked at once in 32 steps, so that the host need not wait for the device:
    since it goes back to the first token, what was wrong in between is found then.
    """
    no_padding = torch.zeros(batch, dtype=torch.int64, device=device)
    if attention_mask is None:
        return Padding(no_padding, True)
    if attention_mask.dim() != 2 or attention_mask.shape not in {(batch, tokens), (batch, cache.seen + tokens)}:
        raise CacheError(
            f"attention_mask has the shape {list(attention_mask.shape)}; it must be [batch, tokens], here "
            f"{[batch, cache.seen + tokens]}, 1 for a token and 0 for padding. Other masks are the model's own and "
            "need not be passed"
        )
    decodes = tokens == 1 and cache.every_row_has_tokens
    goes_back = attention_mask.shape[1] > tokens
    if decodes and goes_back and cache.seen % BLOCK_TOKENS and reading_waits(device):
        return Padding(no_padding, True)
    valid = attention_mask.to(device) != 0
    held, coming = valid[:, :-tokens], valid[:, -tokens:]
    lengths = cache.lengths if cache.states else no_padding
    starts = tokens - coming.sum(dim=1)
    leads = (~coming).cumprod(dim=1).sum(dim=1)
    wrong = (leads != starts) | ((lengths > 0) & (starts > 0))
    if held.shape[1]:
        wrong |= held.sum(dim=1) != lengths
    if bool(wrong.any()):
        raise CacheError(
            "attention_mask has padding after tokens, or masks tokens that the cache already holds: pad on the left "
            "(tokenizer.padding_side = 'left') and keep the mask of earlier calls"
        )
    return Padding(starts.to(torch.int64), bool((lengths + tokens > starts).all()))


def reading_waits(device: torch.device) -> bool:
    """Whether to read a number off a tensor means to wait for the device."""
    return device.type != "cpu"
