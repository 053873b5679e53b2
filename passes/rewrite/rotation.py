"""Rotation: values that are quantized are stored in another basis, and what attention gives is turned back.

A Hadamard matrix spreads each channel over all of a head (QuaRot, arXiv 2404.00456), so that the channels of a token,
which share scales, become alike. Attention gives a mean of values; that of rotated ones is the rotated mean. The
matrices have entries of 1 and -1 alone, and divide by powers of two: both ways are exact but for the rounding of sums.
"""

from dataclasses import replace

import torch
from torch import Tensor, fx

from kvmix_compile.passes.graph.vocabulary import tensor_of
from kvmix_compile.passes.match.sites import AttentionSite


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


def with_rotated_values(module: fx.GraphModule, site: AttentionSite) -> AttentionSite:
    """The site with its values rotated."""
    value = tensor_of(site.value)
    assert value is not None, site.value
    return replace(site, value=_times(module, site.value, site.output, "there", there(site.value_dim, value)))


def turn_back(module: fx.GraphModule, site: AttentionSite, attended: fx.Node) -> None:
    """Turn what attention gives back, wherever it is used."""
    value, users = tensor_of(attended), list(attended.users)
    assert value is not None, attended
    product = _times(module, attended, attended.next, "back", back(site.value_dim, value))
    for user in users:
        user.replace_input_with(attended, product)


def _times(module: fx.GraphModule, node: fx.Node, before: fx.Node, way: str, matrix: Tensor) -> fx.Node:
    """`node` `[batch, heads, tokens, dim]` times a matrix, which is a constant of the module, once for all sites."""
    name = f"rotation_{way}_{len(matrix)}"
    if name not in dict(module.named_buffers(recurse=False)):
        module.register_buffer(name, matrix, persistent=False)
    with module.graph.inserting_before(before):
        constant = module.graph.get_attr(name)
        product = module.graph.call_function(torch.ops.aten.matmul.default, (node, constant))
    product.meta = dict(node.meta)
    return product
