"""Rounding: how coarsely a graph computes, and how far its logits may be from another's that computes the same."""

import torch
from torch import Tensor, fx

from kvmix_compile.passes.graph.vocabulary import tensor_of

# Largest difference of a token's logits, as a share of their standard deviation. On SmolLM2-135M rounding makes 2e-5 in
# float32, 0.013 in float16 and 0.11 in bfloat16; a window of 100 tokens overlooked in one of 30 layers makes 0.4.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 0.05, torch.bfloat16: 0.25}


def coarsest_dtype(graph: fx.Graph) -> torch.dtype:
    """The floating dtype with the fewest digits of all that the graph computes in. Parts of it
    may compute in another than its weights have.
    """
    values = [value for node in graph.nodes if (value := tensor_of(node)) is not None]
    dtypes = {value.dtype for value in values if value.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def difference(actual: Tensor, expected: Tensor) -> float:
    """How much the worst token's logits differ, `[.., tokens, vocabulary]`, as a share of their standard deviation."""
    if actual.shape != expected.shape:
        return torch.inf
    if torch.equal(actual, expected):  # without a standard deviation, perhaps
        return 0.0
    return ((actual - expected).square().mean(-1).sqrt().max() / expected.std()).item()
