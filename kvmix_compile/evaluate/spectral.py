"""Spectral rotations: OSCAR's orthogonal matrix of each head, from what a model reads on a few texts."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.match.mixing import running
from kvmix_compile.passes.match.sites import AttentionSite, find_sites
from kvmix_compile.passes.measure.one_path import capture_to_measure
from kvmix_compile.passes.rewrite.rotation import there


def fitted_rotations(model: nn.Module, rows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of a model that can be analyzed, as of spectral_rotations."""
    captured = capture_to_measure(model, max(row.numel() for row in rows))
    return spectral_rotations(captured, find_sites(captured).matched, rows)


@torch.no_grad()
def spectral_rotations(
    captured: Captured, sites: Sequence[AttentionSite], rows: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Of each site the rotations of its keys and of its values, float32 `[kv_heads, dim, dim]` each: the eigenvectors
    of what is to be told apart, behind them a Hadamard matrix that spreads it over all channels (arXiv 2605.17757).

    For keys that are the second moments of the queries that read them; for values those of the values, each token as
    heavy as its key is large to these queries.
    """
    moments = [_Moments.of(site) for site in sites]
    run = _Recorder(captured, sites)
    for row in rows:
        with running(captured):
            for of_site, attention in zip(moments, run.on(row), strict=True):
                of_site.add(*attention)
    return [(_rotation(of_site.key), _rotation(of_site.value)) for of_site in moments]


class _Moments:
    """Second moments `[kv_heads, dim, dim]`."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value

    @classmethod
    def of(cls, site: AttentionSite) -> "_Moments":
        shapes = ((site.kv_heads, dim, dim) for dim in (site.key_dim, site.value_dim))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Those of one row: `[query heads, tokens, key_dim]`, `[kv_heads, tokens, dim]`."""
        queries = query.double().cpu().unflatten(0, (len(key), -1)).flatten(1, 2)
        key, value = key.double().cpu(), value.double().cpu()
        read = queries.mT @ queries
        self.key += read
        weights = ((key @ read) * key).sum(-1, keepdim=True)
        self.value += value.mT @ (value * weights)


def _rotation(moments: Tensor) -> Tensor:
    vectors = torch.linalg.eigh(moments).eigenvectors.flip(-1).float()
    hadamard = there(moments.shape[-1], vectors)
    return vectors @ (hadamard / hadamard[:, :1].norm(dim=0))


class _Recorder(fx.Interpreter):
    """Runs the captured graph and keeps what attention is given."""

    def __init__(self, captured: Captured, sites: Sequence[AttentionSite]) -> None:
        super().__init__(captured.module)
        self.captured, self.sites = captured, sites
        self.watched = {node for site in sites for node in (site.query, site.key, site.value)}
        self.values: dict[fx.Node, Tensor] = {}

    def on(self, row: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values of each site, for the token ids of a row, int64 `[tokens]`."""
        self.run(*self.captured.inputs(row, logits=slice(-1, None)))
        return [tuple(self.values[node][0] for node in (site.query, site.key, site.value)) for site in self.sites]  # type: ignore[misc]

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if node in self.watched:
            self.values[node] = value
        return value
