"""Masks by probing: what lies between the attention scores and the softmax is run on a probe and recognised by what
it does.

The model may have written a boolean mask, an additive one, `where`, `masked_fill`, a scale before or after, a soft cap.
Whatever it is, where attention is allowed a score must become `scale * score` or `cap * tanh(scale * score / cap)`, and
minus infinity elsewhere. A bias may be added that is linear in the distance of the two tokens. Anything else is an
error.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from sympy import Integer
from torch import Tensor, fx

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.export import UNLIMITED
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.evaluate import evaluate
from kvmix_compile.passes.graph.vocabulary import SHAPE_ONLY, graph_inputs, operation, tensor_of
from kvmix_compile.passes.match.scores import function_of, scale_and_softcap
from kvmix_compile.passes.match.sink_logits import SinkLogits
from kvmix_compile.passes.match.slopes import slopes_of

# A probe of n tokens costs n * n scores a layer; 8192 of them is half a gigabyte for a moment.
LONGEST_PROBE = 8192
SHORTEST_PROBE = 48
# An additive mask blocks with the lowest number of its dtype, or a "large" constant such as -1e4 in older models.
BLOCKED = -1e4

MaskKind = Literal["causal", "sliding", "chunked"]


@dataclass(frozen=True)
class Mask:
    """Which past tokens a token may attend to.

    `size` is the window or chunk in tokens, 0 for plain causal attention.
    """

    kind: MaskKind
    size: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "causal" else f"{self.kind} {self.size}"


@dataclass(frozen=True)
class ScoreFunction:
    """What happens to a score on its way to the softmax: scale, soft cap (0 for none), mask, and ALiBi's slopes, of all
    heads or of each (none: no bias).
    """

    scale: float
    softcap: float
    mask: Mask
    slopes: tuple[float, ...] = ()

    def __str__(self) -> str:
        extras = (f", soft cap {self.softcap:g}" if self.softcap else "") + (", ALiBi" if self.slopes else "")
        return f"{self.mask}{extras}"


class Probe:
    """Evaluates what depends on positions alone, each mask once however many layers share it."""

    def __init__(self, captured: Captured) -> None:
        self.captured, self.dataflow = captured, captured.dataflow
        self.longest_context = captured.longest_context
        self._recognised: dict[tuple[fx.Node, int], tuple[Mask, tuple[float, ...]]] = {}

    def mask_and_slopes(self, node: fx.Node, layer: str) -> tuple[Mask, tuple[float, ...]]:
        """The mask that `node`, boolean or additive `[.., tokens, tokens]`, stands for, and the slopes of its bias."""
        if node in self.dataflow.token_dependent:
            raise UnsupportedModelError(
                f"{layer}: its attention mask depends on the tokens themselves, not on positions alone"
            )
        tokens = self.tokens_for(node, layer)
        key = (node, tokens)
        if key not in self._recognised:
            value = evaluate(self.captured.module, node, self.inputs(tokens))
            allowed = allowed_by(value, layer)
            slopes = () if value.dtype is torch.bool else slopes_of(value, allowed, layer)
            self._recognised[key] = recognise(allowed, layer), slopes
        return self._recognised[key]

    def tokens_for(self, node: fx.Node, layer: str) -> int:
        """How long a probe must be to see every window that `node`'s subgraph could hold: past its largest constant."""
        constants = {
            constant
            for ancestor in (self.dataflow.ancestors(node) | {node}) - self.dataflow.token_dependent
            for constant in _integers(ancestor)
        }
        if tables := self._tables_for(node):
            return min(tables)
        # What is beyond the model's positions never takes effect; the largest integers are ends of slices.
        limit = self.longest_context or UNLIMITED
        largest = max((constant for constant in constants if SHORTEST_PROBE // 2 < constant < limit), default=0)
        if largest > LONGEST_PROBE:
            raise UnsupportedModelError(
                f"{layer}: its attention mask depends on the constant {largest}, too long to probe (at most "
                f"{LONGEST_PROBE})"
            )
        return max(SHORTEST_PROBE, largest + SHORTEST_PROBE // 2)

    def _tables_for(self, node: fx.Node) -> list[int]:
        """The sizes of the masks that the model made beforehand and cuts to length: any window is somewhere in them."""
        tables = [tensor_of(source) for source in self.dataflow.ancestors(node) if source.op == "get_attr"]
        squares = [table for table in tables if table is not None and table.dtype is torch.bool and table.dim() >= 2]
        return [table.shape[-1] for table in squares if SHORTEST_PROBE < table.shape[-1] <= LONGEST_PROBE]

    def inputs(self, tokens: int) -> dict[fx.Node, Tensor]:
        """Values for the graph's inputs: one row of `tokens` tokens at positions 0, 1, 2, ..."""
        device = next((p.device for p in self.captured.model.parameters()), torch.device("cpu"))
        positions = torch.arange(tokens, device=device)
        values = {"input_ids": torch.zeros_like(positions)[None], "position_ids": positions[None]}
        return {node: values.get(node.name, positions[:1]) for node in graph_inputs(self.captured.graph)}

    def score_function(
        self, scores: fx.Node, weights_input: fx.Node, sink: SinkLogits | None, layer: str
    ) -> ScoreFunction:
        """What the graph does between `scores` `[.., tokens, tokens]` and the softmax's input, as one function
        of a score. `sink`: what is concatenated to the scores in between, if anything.
        """
        tokens = self.tokens_for(weights_input, layer)
        run = function_of(self.captured.module, scores, weights_input, sink, self.inputs(tokens))
        no_scores = self._no_scores(scores, tokens)
        try:
            bias = run(no_scores)
        except RuntimeError:  # a view that wants all heads
            no_scores = no_scores.expand(*self._with_one_row(scores), tokens, tokens)
            bias = run(no_scores)
        allowed = allowed_by(bias, layer)
        slopes = slopes_of(bias, allowed, layer)
        if sink is not None and slopes:
            raise UnsupportedModelError(f"{layer}: sink logits beside a bias on attention scores are not supported")
        precision = torch.finfo(scores.meta["val"].dtype).eps
        scale, softcap = scale_and_softcap(run, no_scores, allowed, precision, layer)
        return ScoreFunction(scale, softcap, recognise(allowed, layer), slopes)

    def _no_scores(self, scores: fx.Node, tokens: int) -> Tensor:
        """Scores of zero, of one row. Heads need not all be there, unless they are one dimension with the rows.

        In single precision at least, so that what is read off them is not rounded.
        """
        value = scores.meta["val"]
        outer = [1] * (value.dim() - 2) if value.dim() > 3 else self._with_one_row(scores)
        return torch.zeros(
            *outer, tokens, tokens, dtype=torch.promote_types(value.dtype, torch.float32), device=value.device
        )

    def _with_one_row(self, scores: fx.Node) -> list[int]:
        """The sizes of all but the last two dimensions for a batch of one."""
        rows = {self.captured.batch.node.expr: Integer(1)}
        return [
            int(size.node.expr.xreplace(rows)) if isinstance(size, torch.SymInt) else size
            for size in scores.meta["val"].shape[:-2]
        ]


def recognise(allowed: Tensor, layer: str) -> Mask:
    """The mask that a boolean `[tokens, tokens]` (query, key) is, by comparison with every kind that is known."""
    query = torch.arange(allowed.shape[0], device=allowed.device)[:, None]
    key = query.T
    causal = key <= query
    if torch.equal(allowed, causal):
        return Mask("causal")
    if (allowed & ~causal).any():
        raise UnsupportedModelError(
            f"{layer}: its attention is not causal (a token attends to later ones): an encoder or a bidirectional "
            "model has no KV cache to compress"
        )
    size = int(allowed.sum(dim=1).max())
    if torch.equal(allowed, causal & (query - key < size)):
        return Mask("sliding", size)
    if torch.equal(allowed, causal & (query // size == key // size)):
        return Mask("chunked", size)
    raise UnsupportedModelError(f"{layer}: its attention mask is none of causal, sliding window and chunked")


def allowed_by(mask: Tensor, layer: str) -> Tensor:
    """Boolean `[tokens, tokens]` of a boolean or additive mask that allows the same to every row and head."""
    allowed = is_allowed(mask)
    tokens = allowed.shape[-1]
    flat = allowed.expand(*allowed.shape[:-2], tokens, tokens).reshape(-1, tokens, tokens)
    if not torch.equal(flat, flat[:1].expand_as(flat)):
        raise UnsupportedModelError(f"{layer}: its heads have different attention masks, which is not supported")
    return flat[0]


def is_allowed(mask: Tensor) -> Tensor:
    """Where a boolean or additive mask allows attention, boolean of its shape."""
    return mask if mask.dtype is torch.bool else mask > BLOCKED


def unbiased(mask: Tensor, layer: str) -> Tensor:
    """As is_allowed, for a mask that does nothing else to scores. Raises UnsupportedModelError for a bias."""
    allowed = is_allowed(mask)
    if mask.dtype is not torch.bool and mask.masked_fill(~allowed, 0).any():
        raise UnsupportedModelError(
            f"{layer}: it adds a bias to its attention scores, which is not supported here: ALiBi works with "
            "kvmix_compile.apply"
        )
    return allowed


def _integers(node: fx.Node) -> list[int]:
    if operation(node) in SHAPE_ONLY:
        return []
    found: list[int] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda value: found.append(value) if type(value) is int else None)
    return found
