"""Scores by probing: the scale and the soft cap that a graph applies to attention scores, seen by running it on some.

The graph may be one that was captured, or one of Dynamo: both are run from the scores to the softmax's input.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.evaluate import evaluate
from kvmix_compile.passes.match.sink_logits import PROBED_LOGIT, SinkLogits, without_column

# A score that saturates every soft cap in use (30 to 50) at any scale in use, and that float16 can hold.
SATURATING = 3e4
SMALLEST_SCORE = 2.0**-6
# Models that rescale scores by a learned or computed factor do it in float32 at best.
TOLERANCE = 1e-4


def function_of(
    module: fx.GraphModule,
    scores: fx.Node,
    weights_input: fx.Node,
    sink: SinkLogits | None,
    known: Mapping[fx.Node, Any],
) -> Callable[[Tensor], Tensor]:
    """What the graph makes of scores, in float32, by the time they are the softmax's input; the other arguments are
    those of Probe.score_function, `known` the graph's inputs.
    """

    def run(value: Tensor) -> Tensor:
        given = {**known, scores: value}
        if sink is None:
            return evaluate(module, weights_input, given).float()
        joined = evaluate(module, sink.scores, given)
        column = torch.full_like(joined[..., :1], PROBED_LOGIT)
        return without_column(
            evaluate(module, weights_input, {**known, sink.scores: joined, sink.column: column}).float()
        )

    return run


def scale_and_softcap(
    run: Callable[[Tensor], Tensor], no_scores: Tensor, allowed: Tensor, precision: float, layer: str
) -> tuple[float, float]:
    """The scale and the soft cap (0: none) that `run` applies to scores, float32 out, of the shape, dtype and device of
    `no_scores` `[.., queries, keys]` wherever it is `allowed`, boolean `[queries, keys]`. `precision`: the rounding of
    what the model computes them in, as a share.
    """
    bias = run(no_scores)
    largest_bias = bias.masked_fill(~allowed, 0).abs().max().item()
    # A score is looked at where the bias leaves it the most digits, as late in the text as possible.
    last = int(bias.abs().masked_fill(~allowed, torch.inf).flatten().flip(0).argmin()) + 1

    def at(score: float) -> float:
        """What a score becomes where attention is allowed, its bias aside."""
        return (run(no_scores + score) - bias).flatten()[-last].item()

    # A soft cap is what remains of a score without bounds; without one the function is linear.
    unbounded = at(SATURATING) / SATURATING
    scale = at(SMALLEST_SCORE) / SMALLEST_SCORE
    capped = abs(unbounded - scale) > 0.1 * abs(scale)
    softcap = unbounded * SATURATING if capped else 0.0
    scale = scale if capped else at(1.0)
    for probe in _probes(no_scores):
        expected = probe.float() * scale
        if capped:
            expected = softcap * torch.tanh(expected / softcap)
        error = (run(probe) - bias - expected).abs()
        # Where the largest score is taken from all of them, they are rounded as it is.
        largest = expected.abs().max().item()
        rounding = TOLERANCE * expected.abs().clamp(min=min(1.0, largest)) + 8 * precision * (largest + largest_bias)
        if (~(error <= rounding) & allowed).any():
            raise UnsupportedModelError(
                f"{layer}: what happens between its attention scores and the softmax is not a scale, a soft cap and a "
                "mask"
            )
    return scale, softcap


def _probes(like: Tensor) -> Iterator[Tensor]:
    """Random scores: as they usually are, and of either sign from SMALLEST_SCORE to SATURATING, as many of each order
    of magnitude, so that what is cut off anywhere shows.
    """
    generator = torch.Generator().manual_seed(0)
    yield torch.randn(like.shape, generator=generator).to(like)
    share, sign = torch.rand(2, *like.shape, generator=generator)
    size = SMALLEST_SCORE * (SATURATING / SMALLEST_SCORE) ** share
    yield torch.where(sign < 0.5, -size, size).to(like)
