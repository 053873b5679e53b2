"""Rounding: how coarsely a graph computes, which parts of it may do in another dtype than its weights have."""

import torch
from torch import fx

from kvmix_compile.passes.vocabulary import tensor_of


def coarsest_dtype(graph: fx.Graph) -> torch.dtype:
    """The floating dtype with the fewest digits of all that the graph computes in."""
    values = [value for node in graph.nodes if (value := tensor_of(node)) is not None]
    dtypes = {value.dtype for value in values if value.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
