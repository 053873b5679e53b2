"""Slopes: a bias on attention scores that is linear in how far back a token lies (ALiBi, arXiv 2108.12409), recognised
by what it does.
"""

import torch
from torch import Tensor

from kvmix_compile.passes.errors import UnsupportedModelError

# How far, as a share of the largest bias, one may be from linear: that of models that compute it in bfloat16 and scale
# it once more is rounded by 2 ** -9 twice, at both ends of a distance.
TOLERANCE = 2.0**-6


def slopes_of(bias: Tensor, allowed: Tensor, layer: str) -> tuple[float, ...]:
    """Of each head the s for which its bias is `s * (key - query)`, up to a number for each query; none at all where
    every bias is 0.

    `bias`: float `[.., queries, keys]`, of one row, its heads in the dimension before these two if there are several.
    `allowed`: bool `[queries, keys]`; where it is false the bias does not matter.
    Raises UnsupportedModelError for a bias that is something else.
    """
    heads = bias.masked_fill(~allowed, 0).flatten(0, -3) if bias.dim() > 2 else bias.masked_fill(~allowed, 0)[None]
    if not heads.any():
        return ()
    key = torch.arange(allowed.shape[1], device=allowed.device, dtype=torch.float64).expand(allowed.shape)
    distance = _centred(key, allowed)
    slopes = []
    # A head at a time: in float64, a bias of many heads and tokens is large.
    for head in heads:
        head = _centred(head.double(), allowed)
        slope = (head * distance).sum() / distance.square().sum()
        if not (head - slope * distance).abs().max() <= TOLERANCE * heads.abs().max():
            raise UnsupportedModelError(
                f"{layer}: it adds a bias to its attention scores that is not linear in the distance of two tokens, as "
                "ALiBi's is: that is not supported"
            )
        slopes.append(slope.item())
    return tuple(slopes)


def _centred(values: Tensor, allowed: Tensor) -> Tensor:
    """Less the mean of each query's, which changes no weight; zero where nothing is allowed."""
    values = values.masked_fill(~allowed, 0)
    mean = values.sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True).clamp(min=1)
    return (values - mean).masked_fill(~allowed, 0)
