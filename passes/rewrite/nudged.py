"""Nudged: how far logits move when embeddings do by next to nothing.

Of a model that computes with real numbers, as well as its dtype can, they move by about as much. One that rounds its
activations to few levels, as dynamic quantization does, rounds some of them the other way, and its logits jump. So they
do wherever its arithmetic is done in another order: in chunks, say, instead of at once.
"""

from typing import Any

import torch
from torch import Tensor, fx

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.graph.rounding import TOLERANCE, coarsest_dtype
from kvmix_compile.passes.graph.vocabulary import tensor_of

# Of the tolerated difference of logits: a model of real numbers answers with ten times as much or less.
NUDGE = 0.01


def nudge(captured: Captured) -> float:
    """By what share of itself an element of the embeddings is changed, as a standard deviation."""
    return NUDGE * TOLERANCE[coarsest_dtype(captured.graph)]


@torch.no_grad()
def response(captured: Captured, row: Tensor) -> float:
    """How much that changes the logits of token ids int64 `[tokens]`: the median token's, root mean square over the
    vocabulary, as a share of the logits' standard deviation.

    The median, because a nudge that sends a token to another expert makes that one's logits jump, and few others.
    """
    exact, nudged = (_Nudged(captured, by).run(*captured.inputs(row)) for by in (0.0, nudge(captured)))
    exact, nudged = (_logits(output) for output in (exact, nudged))
    return ((nudged - exact).square().mean(-1).sqrt().median() / exact.std()).item()


class _Nudged(fx.Interpreter):
    """Runs a graph with what its tokens are embedded as multiplied by 1 and a little noise, the same each time."""

    def __init__(self, captured: Captured, by: float) -> None:
        super().__init__(captured.module)
        self.embeddings, self.by = _embeddings(captured), by
        self.generator = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n not in self.embeddings or not self.by:
            return value
        noise = torch.randn(value.shape, generator=self.generator).to(value.device)
        return (value * (1 + self.by * noise)).to(value.dtype)


def _embeddings(captured: Captured) -> set[fx.Node]:
    """Where token ids become floating-point numbers."""
    dataflow = captured.dataflow
    floating = {
        node
        for node in dataflow.token_dependent
        if (value := tensor_of(node)) is not None and value.is_floating_point()
    }
    return {node for node in floating if not dataflow.ancestors(node) & floating}


def _logits(output: Any) -> Tensor:
    return (output[0] if isinstance(output, tuple | list) else output).float()
