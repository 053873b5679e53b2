"""Measure: how much each site's keys and values matter to the loss.

One forward and one backward of the captured graph for each calibration row give two answers:

- the KVmix score (arXiv 2506.08018): the norm of the loss's gradient with respect to the weights of the key and of the
  value projection;
- the sensitivity to each candidate precision: half the sum over elements of (gradient x quantization error)^2, the
  second-order increase of the loss with the Hessian replaced by the diagonal of the empirical Fisher information.
  Unlike the score, it compares keys with values and one precision with another, because the error is the one that the
  quantizer really makes.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kvmix_compile.kernels.packing import dequantize_block, quantize_block
from kvmix_compile.kernels.precision import BLOCK_TOKENS, CHANNEL_MULTIPLE, Axis, Precision
from kvmix_compile.passes.allocate import PUBLISHED_GROUP, Policy, SiteImportance, allocate
from kvmix_compile.passes.capture import Captured, graph_inputs
from kvmix_compile.passes.dataflow import Dataflow
from kvmix_compile.passes.errors import CalibrationError, UnsupportedModelError
from kvmix_compile.passes.plan import Plan, SitePlan
from kvmix_compile.passes.projections import Projection, find_projection
from kvmix_compile.passes.sites import AttentionSite

# What fisher chooses from. One bit is left out: its error is too large for a second-order estimate, and SmolLM2-135M's
# perplexity at 2.3 bits is 21.39 with it and 21.03 without. 4-bit scales and zero points cost 0.1 of perplexity and
# save 0.7 bits an element.
CANDIDATE_BITS = (2, 3, 4, 8)
# Small groups are cheap with 4-bit scales: 0.5 bits an element in groups of 16, 0.28 in groups of 32. Keys cannot have
# larger groups than a block has tokens. At 8 bits the group hardly matters.
KEY_GROUPS = (16, 32)
VALUE_GROUPS = (16, 32, 64)
CANDIDATE_SCALE_BITS = 4


@dataclass(frozen=True)
class Importance:
    """What was measured, and for which state: the first `sinks` and last `recent` tokens of a row stay in full
    precision.
    """

    sites: tuple[SiteImportance, ...]
    fingerprint: str
    sinks: int
    recent: int
    tokens: int
    loss: float

    def allocate(
        self, *, budget: float | None = None, storage_budget: float | None = None, policy: Policy = "fisher"
    ) -> Plan:
        """A plan that spends a budget of bits where they matter; see `passes.allocate.allocate`."""
        precisions = allocate(self.sites, policy=policy, budget=budget, storage_budget=storage_budget)
        sites = tuple(
            SitePlan(site.layer, key, value, site.kv_heads, site.key_dim, site.value_dim)
            for site, (key, value) in zip(self.sites, precisions, strict=True)
        )
        return Plan(sites, policy, self.fingerprint, self.sinks, self.recent)


@dataclass
class _Tally:
    """Sums over calibration rows for the keys or the values of one site."""

    candidates: tuple[Precision, ...]
    axis: Axis
    gradient_norm: float = 0.0
    sensitivity: dict[Precision, float] = field(default_factory=dict)

    def add_sensitivity(self, values: Tensor, gradient: Tensor, sinks: int) -> None:
        """Add one row: `values` and the loss's `gradient` to them, `[1, kv_heads, tokens, dim]`."""
        _, heads, tokens, dim = values.shape
        # A row too short to leave a block behind its sinks is measured as if it had fewer.
        first = min(sinks, tokens - BLOCK_TOKENS)
        blocks = (tokens - first) // BLOCK_TOKENS
        stored = slice(first, first + blocks * BLOCK_TOKENS)
        shape = (heads, blocks, BLOCK_TOKENS, dim)
        original, slope = values[0, :, stored].reshape(shape).float(), gradient[0, :, stored].reshape(shape).float()
        for candidate in self.candidates:
            loss = 0.0
            if candidate.is_quantized:
                packed = quantize_block(original, candidate, self.axis)
                error = dequantize_block(packed, candidate, self.axis, dim, torch.float32) - original
                loss = 0.5 * (slope * error).square().sum().item() / (blocks * BLOCK_TOKENS)
            self.sensitivity[candidate] = self.sensitivity.get(candidate, 0.0) + loss


def candidates_for(dim: int, axis: Axis) -> tuple[Precision, ...]:
    """The precisions to choose from for keys or values with `dim` elements a head, 16 bits included.

    Those alone where `dim` is no multiple of 8, which cannot be packed.
    """
    if dim % CHANNEL_MULTIPLE:
        return (Precision(16),)
    groups = [group for group in (KEY_GROUPS if axis == Axis.TOKENS else VALUE_GROUPS) if _fits(group, dim, axis)]
    groups = groups or [max(group for group in range(1, PUBLISHED_GROUP + 1) if dim % group == 0)]
    usual = max(group for group in groups if group <= PUBLISHED_GROUP)
    quantized = tuple(
        Precision(bits, group, CANDIDATE_SCALE_BITS)
        for bits in CANDIDATE_BITS
        for group in groups
        if bits < 8 or group == usual
    )
    return (*quantized, Precision(16))


def _fits(group: int, dim: int, axis: Axis) -> bool:
    return axis == Axis.TOKENS or dim % group == 0


def measure(
    captured: Captured,
    sites: Sequence[AttentionSite],
    rows: Sequence[Tensor],
    *,
    sinks: int,
    recent: int,
    on_row: Callable[[], None] = lambda: None,
) -> Importance:
    """The importance of every site on `rows` of token ids (int64 `[tokens]`), one forward and one backward each.

    The model's weights need no gradient and get none. `on_row` is called after each row.
    """
    rows = [row for row in rows if row.numel() >= BLOCK_TOKENS]
    if not rows:
        raise CalibrationError(
            f"calibration needs a row of at least {BLOCK_TOKENS} tokens, the block that is quantized together: pass "
            "longer texts"
        )
    recorder = _Recorder(captured, sites)
    keys = [_Tally(candidates_for(site.key_dim, Axis.TOKENS), Axis.TOKENS) for site in sites]
    values = [_Tally(candidates_for(site.value_dim, Axis.CHANNELS), Axis.CHANNELS) for site in sites]
    total_loss, predicted = 0.0, 0
    for row in rows:
        total_loss += recorder.add(row, keys, values, sinks)
        predicted += row.numel() - 1
        on_row()
    measured = tuple(_site_importance(*entry, rows=len(rows)) for entry in zip(sites, keys, values, strict=True))
    return Importance(
        measured, fingerprint(captured, sites), sinks, recent, sum(row.numel() for row in rows), total_loss / predicted
    )


def fingerprint(captured: Captured, sites: Sequence[AttentionSite]) -> str:
    """A digest of the model's structure: its parameters' names and shapes, and its sites.

    The same for every set of weights.
    """
    parts = [f"{name}{tuple(parameter.shape)}" for name, parameter in captured.model.named_parameters()]
    parts += [f"{site.layer}{(site.query_heads, site.kv_heads, site.key_dim, site.value_dim)}" for site in sites]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _site_importance(site: AttentionSite, key: _Tally, value: _Tally, rows: int) -> SiteImportance:
    return SiteImportance(
        site.layer,
        site.kv_heads,
        site.key_dim,
        site.value_dim,
        key.gradient_norm / rows,
        value.gradient_norm / rows,
        {precision: loss / rows for precision, loss in key.sensitivity.items()},
        {precision: loss / rows for precision, loss in value.sensitivity.items()},
    )


class _Recorder(fx.Interpreter):
    """Runs the captured graph on one row at a time and holds on to what gradients are wanted of."""

    def __init__(self, captured: Captured, sites: Sequence[AttentionSite]) -> None:
        super().__init__(captured.module)
        self.captured = captured
        self.sites = sites
        dataflow = Dataflow(captured.graph)
        self.projections = [
            (find_projection(site.key, dataflow), find_projection(site.value, dataflow)) for site in sites
        ]
        found = [projection for pair in self.projections for projection in pair if projection is not None]
        self.differentiated = {node for site in sites for node in (site.key, site.value)}
        self.differentiated |= {projection.output for projection in found}
        self.watched = self.differentiated | {projection.input for projection in found}
        self.values: dict[fx.Node, Tensor] = {}
        self.passed_on: dict[fx.Node, tuple[Tensor, int]] = {}
        self.features: dict[tuple[fx.Node, fx.Node], Tensor] = {}

    def fetch_attr(self, target: str) -> object:
        value = super().fetch_attr(target)
        # Activations are differentiated, weights are not: without this autograd would keep what the weights'
        # gradients need.
        return value.detach() if isinstance(value, Tensor) else value

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if node not in self.watched:
            return value
        if node in self.differentiated and not value.requires_grad:
            value = value.detach().requires_grad_()
        self.values[node] = value
        # A leaf may not be written to in place, its copy may; _check_unwritten then finds that it was.
        passed_on = value.clone() if value.is_leaf else value
        self.passed_on[node] = (passed_on, passed_on._version)
        return passed_on

    def _check_unwritten(self) -> None:
        """Gradients belong to values: keys and values that were written to after they were made have several."""
        for site in self.sites:
            for node in (site.key, site.value):
                value, version = self.passed_on[node]
                if value._version != version:
                    raise UnsupportedModelError(
                        f"{site.layer}: its keys or values are written in place, so their importance cannot be "
                        "measured: apply a plan instead"
                    )

    def add(self, row: Tensor, keys: Sequence[_Tally], values: Sequence[_Tally], sinks: int) -> float:
        """Add one row's gradients and sensitivities to the tallies; returns its summed loss in nats."""
        tokens = row.numel()
        with torch.enable_grad():
            loss = self._loss(row)
            self._check_unwritten()
            nodes = sorted(self.differentiated, key=lambda node: node.name)
            gradients = dict(
                zip(nodes, torch.autograd.grad(loss, [self.values[n] for n in nodes], retain_graph=True), strict=True)
            )
            for site, pair, key, value in zip(self.sites, self.projections, keys, values, strict=True):
                for node, projection, tally in ((site.key, pair[0], key), (site.value, pair[1], value)):
                    norm = self._weight_gradient_norm(node, projection, gradients) / (tokens - 1)
                    tally.gradient_norm += norm
                    with torch.no_grad():
                        tally.add_sensitivity(self.values[node], gradients[node], sinks)
        self.values.clear()
        self.passed_on.clear()
        return loss.item()

    def _loss(self, row: Tensor) -> Tensor:
        positions = torch.arange(row.numel(), device=row.device)
        by_name = {"input_ids": row[None], "position_ids": positions[None], "logit_positions": positions}
        logits = self.run(*(by_name[node.name] for node in graph_inputs(self.captured.graph)))
        return F.cross_entropy(logits[0, :-1].float(), row[1:], reduction="sum")

    def _weight_gradient_norm(
        self, node: fx.Node, projection: Projection | None, gradients: dict[fx.Node, Tensor]
    ) -> float:
        """||dL/dW|| of the rows of the projection's weights that make the keys or values; NaN where there is no
        projection.

        From activations alone, dL/dW = (dL/dy)^T x, so that W may be quantized.
        """
        if projection is None:
            return float("nan")
        slope = gradients[projection.output].flatten(0, -2)
        features = self._features(node, projection.output)
        return (
            (slope[:, features].T.float() @ self.values[projection.input].detach().flatten(0, -2).float()).norm().item()
        )

    def _features(self, node: fx.Node, output: fx.Node) -> Tensor:
        """Which output features of a projection the keys or values at `node` are made of: all, unless it is a
        fused one.
        """
        if (node, output) not in self.features:
            value, source = self.values[node], self.values[output]
            generator = torch.Generator().manual_seed(0)
            probe = torch.randn(value.shape, generator=generator).to(value)
            (reached,) = torch.autograd.grad(value, source, probe, retain_graph=True)
            self.features[node, output] = reached.flatten(0, -2).abs().sum(0) > 0
        return self.features[node, output]
