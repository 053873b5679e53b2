"""Queries: what is done to keys, or to values that are keys too, is done to the channels of queries that score them."""

from collections.abc import Callable
from dataclasses import replace

from torch import fx, ops

from kvmix_compile.passes.match.sites import AttentionSite

Change = Callable[[fx.Node], fx.Node]


def with_changed_queries(
    graph: fx.Graph, site: AttentionSite, *, of_keys: Change | None = None, of_values: Change | None = None
) -> AttentionSite:
    """The site with the channels changed that score its keys, and those that score its values, if any do. A change is
    given a node in front of `site.output`, and makes one of the same shape.
    """
    if not site.values_are_keys:
        return replace(site, query=of_keys(site.query)) if of_keys else site
    if of_keys is None and of_values is None:
        return site
    end = site.value_dim + site.key_dim
    parts = []
    for begin, behind, change in ((0, site.value_dim, of_values), (site.value_dim, end, of_keys)):
        with graph.inserting_before(site.output):
            part = graph.call_function(ops.aten.slice.Tensor, (site.query, 3, begin, behind))
        part.meta = {**site.query.meta, "val": site.query.meta["val"][..., begin:behind]}
        parts.append(change(part) if change else part)
    with graph.inserting_before(site.output):
        query = graph.call_function(ops.aten.cat.default, (parts, -1))
    query.meta = dict(site.query.meta)
    return replace(site, query=query)
