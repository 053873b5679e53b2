"""Cut: the narrowest row that a site's keys and values are a linear map of, token by token.

What a cache has to hold of a token is whatever separates what is worked out of the token from its attention: its keys
and values are one such separation, and not always the narrowest. Grouped queries read keys and values before their
heads are repeated, and multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) reads those of all heads from a
latent and a rotary key that they share. Nothing here knows of either: what separates most narrowly is a minimum cut of
the dataflow.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import networkx
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.graph.dataflow import Dataflow
from kvmix_compile.passes.graph.vocabulary import LAYOUT, operation, tensor_of
from kvmix_compile.passes.match.sites import AttentionSite

# What moves numbers within a token, or repeats them. A change of dtype rounds them.
_ARRANGING = (LAYOUT | {"cat"}) - {"to", "index", "index_select"}

_SOURCE, _SINK = "what is worked out of each token", "attention"
_Place = tuple[fx.Node, str] | str


@dataclass(frozen=True)
class Cut:
    """Nodes of which together the keys and values are a linear map, and how many numbers these are a token."""

    nodes: tuple[fx.Node, ...]
    numbers: int


def narrowest_cut(site: AttentionSite, captured: Captured) -> Cut | None:
    """The fewest numbers a token that the site's keys and values are a linear map of, those next to the attention where
    there are several; None where there is no such map, not even that of themselves.
    """
    flow: networkx.DiGraph[_Place] = networkx.DiGraph()
    flow.add_node(_SOURCE)
    pending, seen = [site.key, site.value], set[fx.Node]()
    flow.add_edges_from(((node, "out"), _SINK) for node in pending)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        width = numbers_a_token(node, captured)
        # An edge without a capacity has room for everything: here nothing can be cached.
        flow.add_edge((node, "in"), (node, "out"), **({} if width is None else {"capacity": width}))
        sources = list(linear_sources(node, captured.dataflow))
        flow.add_edges_from(((source, "out"), (node, "in")) for source in sources)
        pending += sources
        if not sources:
            flow.add_edge(_SOURCE, (node, "in"))
    try:
        numbers, (before, _) = networkx.minimum_cut(flow, _SOURCE, _SINK)
    except networkx.NetworkXUnbounded:
        return None
    cut = [node for node in seen if (node, "in") in before and (node, "out") not in before]
    return Cut(tuple(sorted(cut)), int(numbers))


def linear_sources(node: fx.Node, dataflow: Dataflow) -> Iterator[fx.Node]:
    """What depends on tokens and `node` is a linear map of, the same for every token; nothing, where it is none."""
    sources = [source for source in node.all_input_nodes if source in dataflow.token_dependent]
    if _is_linear(node, sources, dataflow):
        yield from sources


def _is_linear(node: fx.Node, sources: list[fx.Node], dataflow: Dataflow) -> bool:
    kind, others = operation(node), [other for other in node.args if other not in sources]
    if kind in _ARRANGING or kind == "neg":
        return True
    if kind in ("add", "sub"):
        return not others and not node.kwargs
    if kind == "mul":
        return len(sources) == 1 and len(others) == 1 and _is_constant(others[0], dataflow)
    if kind == "div":
        return (
            len(node.args) == 2 and node.args[0] in sources and not node.kwargs and _is_constant(node.args[1], dataflow)
        )
    # With a bias a map is not linear.
    if kind in ("linear", "matmul"):
        return (
            len(node.args) == 2 and node.args[0] in sources and not node.kwargs and _is_constant(node.args[1], dataflow)
        )
    return False


def _is_constant(value: object, dataflow: Dataflow) -> bool:
    """Whether it is the same for every token: a number, or made of the model's weights alone."""
    return isinstance(value, int | float) or (isinstance(value, fx.Node) and value not in dataflow.input_dependent)


def numbers_a_token(node: fx.Node, captured: Captured) -> int | None:
    """How many numbers `node` has for each token of each row; None where it is nothing of a token."""
    value = tensor_of(node)
    if value is None:
        return None
    numbers, symbols = 1, list[torch.SymInt]()
    for size in value.shape:
        if isinstance(size, int):
            numbers *= size
        else:
            symbols.append(size)
    is_of_tokens = len(symbols) == 2 and all(
        any(statically_known_true(size == symbol) for symbol in symbols) for size in (captured.batch, captured.tokens)
    )
    return numbers if is_of_tokens else None
