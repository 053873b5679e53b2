"""The quantizers of others, written anew from their papers and descriptions: what a tile of keys or values is read as.

All take float32 `[rows, heads, tokens, dim]` and give the same. Scales, zero points and norms are rounded to float16,
as they are stored.
"""

from functools import cache

import torch
from torch import Tensor

from kvmix_compile.passes.rewrite.rotation import back, there

# llama.cpp's type q4_0: 32 elements with one scale, whose largest one is code 0.
Q4_0_BLOCK = 32
Q4_0_CODES = 16
# KVarN (arXiv 2606.03458): alternations of normalizing rows and columns; a few suffice for the scales to settle.
NORMALIZATIONS = 16
# Points that stand for the normal distribution, and steps of Lloyd's algorithm on them.
LLOYD_POINTS, LLOYD_STEPS = 2**14, 300
SMALLEST = 1e-8


def q4_0(tile: Tensor) -> Tensor:
    """llama.cpp's q4_0 after a Hadamard rotation of the channels, as it stores keys and values since April 2026.

    Heads that are no multiple of Q4_0_BLOCK are a block each.
    """
    rotated = tile @ there(tile.shape[-1], tile)
    block = Q4_0_BLOCK if tile.shape[-1] % Q4_0_BLOCK == 0 else tile.shape[-1]
    blocks = rotated.unflatten(-1, (-1, block))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = half(largest / -(Q4_0_CODES // 2))
    codes = torch.where(scale == 0, 0, blocks / scale).round().clamp(-(Q4_0_CODES // 2), Q4_0_CODES // 2 - 1)
    return (codes * scale).flatten(-2) @ back(tile.shape[-1], tile)


def variance_normalized(tile: Tensor, bits: int, *, keys: bool) -> Tensor:
    """KVarN: a Hadamard rotation, then rows and columns of the tile are divided by their standard deviations in turn
    until both are even, then codes are rounded to the nearest, of keys in groups of a channel, of values of a token.
    """
    rotated = tile @ there(tile.shape[-1], tile)
    of_token, of_channel = _even(rotated)
    # One of the two is part of the scales of the groups.
    other = half(of_token if keys else of_channel)
    return asymmetric(rotated / other, bits, -2 if keys else -1) * other @ back(tile.shape[-1], tile)


def _even(elements: Tensor) -> tuple[Tensor, Tensor]:
    """By what rows and columns are to be divided to be as even as they become: `[..., tokens, 1]` and `[..., 1, dim]`,
    the latter around 1.
    """
    of_token, of_channel = torch.ones_like(elements[..., :1]), torch.ones_like(elements[..., :1, :])
    best, least = (of_token, of_channel), torch.full_like(elements[..., :1, :1], torch.inf)
    for _ in range(NORMALIZATIONS):
        of_token = of_token * _deviation(elements / (of_token * of_channel), -1)
        of_channel = of_channel * _deviation(elements / (of_token * of_channel), -2)
        size = of_channel.log().mean(-1, keepdim=True).exp()
        of_token, of_channel = of_token * size, of_channel / size
        # Rows or columns of a large mean are not evened out for good: the best is not always the last.
        found = _unevenness(elements / (of_token * of_channel))
        best = (of_token.where(found < least, best[0]), of_channel.where(found < least, best[1]))
        least = least.minimum(found)
    return best


def _unevenness(elements: Tensor) -> Tensor:
    """The largest deviation of a row or column over the smallest, `[..., 1, 1]`."""
    rows, columns = _deviation(elements, -1), _deviation(elements, -2)
    return rows.amax(-2, keepdim=True) / rows.amin(-2, keepdim=True) + columns.amax(-1, keepdim=True) / columns.amin(
        -1, keepdim=True
    )


def turbo(tile: Tensor, bits: int) -> Tensor:
    """TurboQuant (arXiv 2504.19874), without its one-bit residual, which implementations leave out: a random rotation,
    then each element becomes the nearest of the levels that are best for a normal distribution of the vector's norm.
    The norm that is stored is the one that the levels need to be as long as the vector was.
    """
    dim = tile.shape[-1]
    generator = torch.Generator().manual_seed(dim)
    signs = torch.randint(0, 2, (dim,), generator=generator).to(tile) * 2 - 1
    rotated = (tile * signs) @ there(dim, tile)
    levels = normal_levels(bits).to(tile)
    size = rotated.square().mean(-1, keepdim=True).sqrt().clamp(min=SMALLEST)
    codes = torch.bucketize(rotated / size, (levels[1:] + levels[:-1]) / 2)
    read = levels[codes]
    corrected = half(size / read.square().mean(-1, keepdim=True).sqrt())
    return (read * corrected) @ back(dim, tile) * signs


def clipped(tile: Tensor, bits: int, rotation: Tensor, kept: float) -> Tensor:
    """OSCAR (arXiv 2605.17757): the channels of each head are rotated by an orthogonal matrix of its own, `rotation`
    `[heads, dim, dim]`; elements beyond the magnitude that a share `kept` of a vector's stay below become that; a
    vector is a group.
    """
    rotated = tile @ rotation
    place = min(int(kept * tile.shape[-1]), tile.shape[-1] - 1)
    most = rotated.abs().sort(-1).values[..., place : place + 1]
    return asymmetric(rotated.clamp(-most, most), bits, -1) @ rotation.mT


def asymmetric(elements: Tensor, bits: int, group: int) -> Tensor:
    """Rounded to the nearest of 2**bits levels between the least and the largest of a group, which goes along the
    dimension `group`.
    """
    zero, largest = half(elements.amin(group, keepdim=True)), elements.amax(group, keepdim=True)
    step = half(((largest - zero) / (2**bits - 1)).clamp(min=SMALLEST))
    codes = torch.where(step == 0, 0, (elements - zero) / step).round().clamp(0, 2**bits - 1)
    return codes * step + zero


@cache
def normal_levels(bits: int) -> Tensor:
    """The 2**bits levels, float64 and ascending, to which a normally distributed number is nearest in the mean square
    (Lloyd's algorithm).
    """
    shares = (torch.arange(LLOYD_POINTS, dtype=torch.float64) + 0.5) / LLOYD_POINTS
    points = torch.erfinv(2 * shares - 1) * 2**0.5
    levels = points[LLOYD_POINTS // 2**bits // 2 :: LLOYD_POINTS // 2**bits].clone()
    for _ in range(LLOYD_STEPS):
        nearest = torch.bucketize(points, (levels[1:] + levels[:-1]) / 2)
        sums = torch.zeros_like(levels).index_add_(0, nearest, points)
        levels = sums / nearest.bincount(minlength=len(levels))
    return levels


def half(numbers: Tensor) -> Tensor:
    """As float16 holds them."""
    return numbers.half().to(numbers.dtype)


def _deviation(elements: Tensor, dim: int) -> Tensor:
    found = elements.std(dim, keepdim=True)
    return found.where(found > SMALLEST, 1)
