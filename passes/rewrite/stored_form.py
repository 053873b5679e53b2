"""Stored form: what a site stores of keys and values that something else than its graph computed, and back.

The same is done to them as rewriting does in the graph: channels in the order of their precisions, powers of two that
let them fit float16, and the rotation of values.
"""

import torch
from torch import Tensor

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.kernels.ops import append_arguments
from kvmix_compile.passes.allocate.plan import StoredSite
from kvmix_compile.passes.rewrite.powers import powers_of_two
from kvmix_compile.passes.rewrite.rotation import back, there


def in_stored_form(key: Tensor, value: Tensor, stored: StoredSite) -> tuple[Tensor, Tensor]:
    """What the site's `append` is given for keys `[batch, kv_heads, tokens, key_dim]` and values as the model has
    them.
    """
    if stored.channel_order is not None:
        key = torch.ops.kvmix.order_channels(key, torch.tensor(stored.channel_order, device=key.device))
    if stored.key_exponents:
        key = key * powers_of_two(stored.key_exponents, -1, key)
    if stored.value_exponents:
        value = value * powers_of_two(stored.value_exponents, -1, value)
    if stored.values_rotated:
        value = value @ there(value.shape[-1], value)
    return key, value


def from_stored_form(key: Tensor, value: Tensor, stored: StoredSite) -> tuple[Tensor, Tensor]:
    """The inverse of `in_stored_form`."""
    if stored.values_rotated:
        value = value @ back(value.shape[-1], value)
    if stored.value_exponents:
        value = value * powers_of_two(stored.value_exponents, 1, value)
    if stored.key_exponents:
        key = key * powers_of_two(stored.key_exponents, 1, key)
    if stored.channel_order is not None:
        order = torch.tensor(stored.channel_order, device=key.device)
        key = torch.ops.kvmix.order_channels(key, order.argsort(dim=1))
    return key, value


def append_to(
    key: Tensor, value: Tensor, state: SiteState, lengths: Tensor, starts: Tensor, stored: StoredSite
) -> None:
    """Append keys and values `[batch, kv_heads, tokens, dim]`, as the model has them, to a site's state. `lengths` and
    `starts`: as of kernels.chunk.Chunk.
    """
    key, value = in_stored_form(key, value, stored)
    chunk = Chunk(key=key, value=value, lengths=lengths, starts=starts)
    torch.ops.kvmix.append(*append_arguments(chunk, state, stored.layout.storage))
