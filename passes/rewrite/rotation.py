"""Rotation: values that are quantized are stored in another basis, and what attention gives is turned back.

A Hadamard matrix spreads each channel over all of a head (QuaRot, arXiv 2404.00456), so that the channels of a token,
which share scales, become alike. Attention gives a mean of values; that of rotated ones is the rotated mean. The
matrices have entries of 1 and -1 alone, and divide by powers of two: both ways are exact but for the rounding of sums.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx

from kvmix_compile.passes.graph.edit import with_constant
from kvmix_compile.passes.match.sites import AttentionSite
from kvmix_compile.passes.rewrite.queries import with_changed_queries


def block_of(channels: int) -> int:
    """How many neighbouring channels are mixed: the largest power of two that divides their number."""
    return channels & -channels


def there(channels: int, like: Tensor) -> Tensor:
    """`[channels, channels]`, in the dtype of `like` and on its device: values times this are the rotated ones."""
    return _hadamard(channels, like) / _divisor(channels, like)


def back(channels: int, like: Tensor) -> Tensor:
    """The inverse of `there`."""
    return _hadamard(channels, like) * (_divisor(channels, like) / block_of(channels))


def _divisor(channels: int, like: Tensor) -> int:
    """The power of two that keeps the size of the values. In float16, where their sum might overflow, that which lets
    none become larger than the largest of those it is made of.
    """
    block = block_of(channels)
    return block if like.dtype == torch.float16 else 2 ** (block.bit_length() // 2)


def _hadamard(channels: int, like: Tensor) -> Tensor:
    # Not `like.new_ones`, which would be as fake as `like` may be.
    matrix = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while len(matrix) < block_of(channels):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix] * (channels // len(matrix)))


def with_rotated_values(module: fx.GraphModule, site: AttentionSite, index: int) -> AttentionSite:
    """The site with its values rotated, and its queries where they score these. `index`: the site's number."""

    def against(channels: int, like: Tensor) -> Tensor:
        # Products of what is turned with values that are rotated are those of both as they were.
        return back(channels, like).T.contiguous()

    def turn(part: fx.Node) -> fx.Node:
        return _turned(module, part, site.output, index, site.value_dim, against)

    site = with_changed_queries(module.graph, site, of_values=turn)
    return replace(site, value=_turned(module, site.value, site.output, index, site.value_dim, there))


def turn_back(module: fx.GraphModule, site: AttentionSite, attended: fx.Node, index: int) -> None:
    """Turn what attention gives back, wherever it is used."""
    users = list(attended.users)
    product = _turned(module, attended, attended.next, index, site.value_dim, back)
    for user in users:
        user.replace_input_with(attended, product)


def _turned(
    module: fx.GraphModule,
    node: fx.Node,
    before: fx.Node,
    index: int,
    channels: int,
    way: Callable[[int, Tensor], Tensor],
) -> fx.Node:
    """`node` `[batch, heads, tokens, channels]`, turned `there` or `back`. Each site has matrices of its own: another
    may compute in another dtype, or on another device.
    """
    name = f"rotation_{way.__name__}_{index}"
    return with_constant(module, torch.ops.aten.matmul.default, node, before, name, lambda value: way(channels, value))
