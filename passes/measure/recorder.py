"""Recorder: a captured graph run on rows of text, forward and back, with what its attentions read held on to."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.match.projections import Projection, find_projection
from kvmix_compile.passes.match.sites import AttentionSite
from kvmix_compile.passes.match.spread import is_spread
from kvmix_compile.passes.measure.loss import summed_cross_entropy
from kvmix_compile.passes.measure.stored_reads import RowAttention


class Recorder(fx.Interpreter):
    """Runs the captured graph on one row at a time and holds on to what gradients are wanted of."""

    def __init__(self, captured: Captured, sites: Sequence[AttentionSite]) -> None:
        super().__init__(captured.module)
        self.captured = captured
        self.sites = sites
        self.projections = [
            (find_projection(site.key, captured.dataflow), find_projection(site.value, captured.dataflow))
            for site in sites
        ]
        found = [projection for pair in self.projections for projection in pair if projection is not None]
        attentions = [attention for site in sites for attention in site.attentions]
        self.differentiated = {attention.output for attention in attentions}
        self.differentiated |= {projection.output for projection in found}
        self.spread = {node for node in self.differentiated if is_spread(node, captured)}
        self.watched = self.differentiated | {projection.input for projection in found}
        self.watched |= {node for it in attentions for node in (it.query, it.key, it.value)}
        self.watched |= {it.sink_logits for it in attentions if it.sink_logits is not None}
        self.values: dict[fx.Node, Tensor] = {}
        self.features: dict[tuple[fx.Node, fx.Node], Tensor] = {}

    def fetch_attr(self, target: str) -> object:
        """As torch.fx calls it: a weight, of which no gradient is wanted."""
        value = super().fetch_attr(target)
        # Activations are differentiated, weights are not: without this autograd would keep what the weights'
        # gradients need.
        return value.detach() if isinstance(value, Tensor) else value

    def run_node(self, node: fx.Node) -> object:
        """As torch.fx calls it: what a node gives, held on to where it is watched."""
        value = super().run_node(node)
        if node.target is torch.ops._c10d_functional.wait_tensor.default:
            value = value.clone()  # which, unlike what it waited for, may be written to in place
        if node not in self.watched:
            return value
        if node in self.differentiated and not value.requires_grad:
            value = value.detach().requires_grad_()
        self.values[node] = value
        # A leaf may not be written to in place, its copy may.
        return value.clone() if node in self.differentiated and value.is_leaf else value

    def gradients_on(self, row: Tensor) -> tuple[float, dict[fx.Node, Tensor]]:
        """The row's summed loss in nats, and the gradient with respect to each node that is differentiated."""
        with torch.enable_grad():
            loss = self._loss(row)
            nodes = sorted(self.differentiated, key=lambda node: node.name)
            return loss.item(), self._gradients(loss, nodes)

    def forget(self) -> None:
        """What was held of the last row."""
        self.values.clear()

    def attention_on(self, site: AttentionSite, gradient: Tensor, sinks: int, recent: int) -> RowAttention:
        """What one attention read in the last row. `gradient`: of the loss with respect to what it gave."""
        queries, keys, values = (self.values[node].detach()[0] for node in (site.query, site.key, site.value))
        logits = None if site.sink_logits is None else self.values[site.sink_logits].flatten()
        scored = torch.cat([values, keys], dim=-1) if site.values_are_keys else keys
        return RowAttention(queries, scored, values, gradient, site.score_function, sinks, recent, logits)

    def _loss(self, row: Tensor) -> Tensor:
        (logits,) = self.run(*self.captured.inputs(row, logits=slice(None, -1)))
        return summed_cross_entropy(logits, row[1:])

    def _gradients(self, loss: Tensor, nodes: Sequence[fx.Node]) -> dict[fx.Node, Tensor]:
        """Those of a loss that each rank has with respect to what nodes gave."""
        # What is differentiated is the sum of the ranks' losses.
        share = loss / self.captured.ranks.count
        gradients = torch.autograd.grad(share, [self.values[node] for node in nodes], retain_graph=True)
        # What all ranks compute alike changes in all of them at once.
        return {
            node: gradient if node in self.spread else self.captured.ranks.sum(gradient)
            for node, gradient in zip(nodes, gradients, strict=True)
        }

    def weight_gradient_norm(
        self, node: fx.Node, projection: Projection | None, gradients: dict[fx.Node, Tensor]
    ) -> float:
        """||dL/dW|| of the rows of the projection's weights that make the keys or values, on all ranks; NaN where there
        is no projection.

        From activations alone, dL/dW = (dL/dy)^T x, so that W may be quantized.
        """
        if projection is None:
            return float("nan")
        slope = gradients[projection.output].flatten(0, -2)
        features = self._features(node, projection.output)
        gradient = slope[:, features].T.float() @ self.values[projection.input].detach().flatten(0, -2).float()
        norm = gradient.norm()[None]
        return (self.captured.ranks.joined(norm) if projection.output in self.spread else norm).norm().item()

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
