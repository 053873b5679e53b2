"""Masks by probing: what lies between the attention scores and the softmax is run on a probe and recognised by what
it does.

Whatever the model wrote (a boolean mask, an additive one, `where`, `masked_fill`, a scale before or after, a soft
cap), the function of one score is `cap * tanh(scale * score / cap)`, or `scale * score`, where attention is allowed,
and minus infinity elsewhere. What is not that is an error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from kvmix_compile.passes.capture import UNLIMITED, Captured, graph_inputs
from kvmix_compile.passes.dataflow import Dataflow
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.evaluate import evaluate
from kvmix_compile.passes.vocabulary import SHAPE_ONLY, operation, tensor_of

# A probe of n tokens costs n * n scores a layer; 8192 of them is half a gigabyte for a moment.
LONGEST_PROBE = 8192
SHORTEST_PROBE = 48
# An additive mask blocks with the lowest number of its dtype, or a "large" constant such as -1e4 in older models.
BLOCKED = -1e4
# A score that saturates every soft cap in use (30 to 50) at any scale in use, and that float16 can hold.
SATURATING = 3e4
# Models that rescale scores by a learned or computed factor do it in float32 at best.
TOLERANCE = 1e-4

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
    """What happens to a score on its way to the softmax: scale, soft cap (0 for none) and mask."""

    scale: float
    softcap: float
    mask: Mask


class Probe:
    """Evaluates what depends on positions alone, each mask once however many layers share it."""

    def __init__(self, captured: Captured, dataflow: Dataflow, longest_context: int | None) -> None:
        self.captured = captured
        self.dataflow = dataflow
        self.longest_context = longest_context
        self._recognised: dict[tuple[fx.Node, int], Mask] = {}

    def mask_of(self, node: fx.Node, layer: str) -> Mask:
        """The mask that `node`, boolean or additive `[.., tokens, tokens]`, stands for."""
        if node in self.dataflow.token_dependent:
            raise UnsupportedModelError(
                f"{layer}: its attention mask depends on the tokens themselves, not on positions alone"
            )
        tokens = self.tokens_for(node, layer)
        key = (node, tokens)
        if key not in self._recognised:
            value = evaluate(self.captured.module, node, self.inputs(tokens))
            self._recognised[key] = recognise(allowed_by(value, layer), layer)
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

    def score_function(self, scores: fx.Node, weights_input: fx.Node, layer: str) -> ScoreFunction:
        """What the graph does between `scores` `[.., tokens, tokens]` and the softmax's input, as one function
        of a score.
        """
        tokens = self.tokens_for(weights_input, layer)
        dtype, device = scores.meta["val"].dtype, scores.meta["val"].device
        rank = scores.meta["val"].dim()
        known = self.inputs(tokens)

        def run(value: Tensor) -> Tensor:
            return evaluate(self.captured.module, weights_input, known | {scores: value}).float()

        ones = torch.ones((1,) * (rank - 2) + (tokens, tokens), dtype=dtype, device=device)
        allowed = allowed_by(run(torch.zeros_like(ones)), layer)
        mask = recognise(allowed, layer)
        return ScoreFunction(*scale_and_softcap(run, ones, allowed, layer), mask)


def scale_and_softcap(
    run: Callable[[Tensor], Tensor], ones: Tensor, allowed: Tensor, layer: str
) -> tuple[float, float]:
    """The scale and the soft cap (0: none) that `run` applies to scores, float32 out, of the shape, dtype and device
    of `ones` `[.., queries, keys]` wherever it is `allowed`, boolean `[queries, keys]`.
    """
    dtype = ones.dtype
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(ones.shape, generator=generator).to(ones.device, dtype)
    # The last token's score with itself or whatever else it may attend to.
    query, key = allowed.nonzero()[-1].tolist()

    def at(score: float) -> float:
        """What a score becomes where attention is allowed."""
        return run(ones * score)[..., query, key].flatten()[-1].item()

    # A soft cap is what remains of a score without bounds; without one the function is linear.
    unbounded = at(SATURATING) / SATURATING
    scale = at(2.0**-6) * 2.0**6
    capped = abs(unbounded - scale) > 0.1 * abs(scale)
    softcap = unbounded * SATURATING if capped else 0.0
    scale = scale if capped else at(1.0)
    expected = noise.float() * scale
    if capped:
        expected = softcap * torch.tanh(expected / softcap)
    actual = run(noise)
    error = (actual - expected).masked_fill(~allowed, 0).abs().max().item()
    if error > max(TOLERANCE, 8 * torch.finfo(dtype).eps) * expected.abs().max().item():
        raise UnsupportedModelError(
            f"{layer}: what happens between its attention scores and the softmax is not a scale, a soft cap and a mask"
        )
    return scale, softcap


def recognise(allowed: Tensor, layer: str) -> Mask:
    """The mask that a boolean `[tokens, tokens]` (query, key) is, by comparison with every kind that is known."""
    query = torch.arange(allowed.shape[0], device=allowed.device)[:, None]
    key = query.T
    causal = key <= query
    if torch.equal(allowed, causal):
        return Mask("causal")
    if (allowed & ~causal).any():
        raise UnsupportedModelError(
            f"{layer}: its attention is not causal (a token attends to later ones). An encoder or a bidirectional "
            "model has no KV cache to compress"
        )
    size = int(allowed.sum(dim=1).max())
    if torch.equal(allowed, causal & (query - key < size)):
        return Mask("sliding", size)
    if torch.equal(allowed, causal & (query // size == key // size)):
        return Mask("chunked", size)
    raise UnsupportedModelError(f"{layer}: its attention mask is none of causal, sliding window and chunked")


def allowed_by(mask: Tensor, layer: str) -> Tensor:
    """Boolean `[tokens, tokens]` of a boolean or additive mask that is the same for every row and head."""
    allowed = unbiased(mask, layer)
    tokens = allowed.shape[-1]
    flat = allowed.expand(*allowed.shape[:-2], tokens, tokens).reshape(-1, tokens, tokens)
    if not torch.equal(flat, flat[:1].expand_as(flat)):
        raise UnsupportedModelError(f"{layer}: its heads have different attention masks, which is not supported")
    return flat[0]


def unbiased(mask: Tensor, layer: str) -> Tensor:
    """Where a boolean or additive mask allows attention, boolean of its shape. It must do nothing else to scores."""
    if mask.dtype is torch.bool:
        return mask
    allowed = mask > BLOCKED
    if mask.masked_fill(~allowed, 0).abs().max() > 0:
        raise UnsupportedModelError(
            f"{layer}: it adds a bias to its attention scores (ALiBi or relative positions), which is not supported"
        )
    return allowed


def _integers(node: fx.Node) -> list[int]:
    if operation(node) in SHAPE_ONLY:
        return []
    found: list[int] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda value: found.append(value) if type(value) is int else None)
    return found
