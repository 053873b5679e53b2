"""Static rewrite: attention over a StaticCache becomes `kvmix::attend` and `kvmix::append` on a packed state.

The buffers leave the graph: as inputs, where they came in, and as outputs, where they were made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from kvmix_compile.passes.allocate.plan import StoredSite
from kvmix_compile.passes.capture.dynamo import Lowered
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.edit import accept_any_strides, add_inputs, clean_up
from kvmix_compile.passes.graph.record import recorded
from kvmix_compile.passes.graph.vocabulary import graph_inputs, operation
from kvmix_compile.passes.match.static_cache import Buffer, CachedSite
from kvmix_compile.passes.rewrite.rewrite import rewrite_site


@dataclass(frozen=True)
class StaticRewritten:
    """`module` takes those inputs of the lowered graph that are left, `kept` by their index there, then `lengths`,
    `starts` and the six tensors of each site in turn (as passes.rewrite.rewrite.Rewritten). It returns a tuple in which
    `buffers` says which outputs stand for a buffer that the graph used to make, and are None.
    """

    module: fx.GraphModule
    kept: tuple[int, ...]
    buffers: dict[int, Buffer]


def rewrite_static(
    lowered: Lowered,
    sites: Sequence[CachedSite],
    stored: Sequence[StoredSite],
) -> StaticRewritten:
    """Rewrite the lowered graph, in place, each site as `stored` says of it.

    Raises UnsupportedModelError where something besides attention reads what a site's cache holds.
    """
    inputs = graph_inputs(lowered.graph)
    _, buffers = recorded("static rewrite", lowered.module, lambda: _rewrite(lowered, sites, stored))
    left = set(graph_inputs(lowered.graph))
    return StaticRewritten(lowered.module, tuple(index for index, node in enumerate(inputs) if node in left), buffers)


def _rewrite(lowered: Lowered, sites: Sequence[CachedSite], stored: Sequence[StoredSite]) -> dict[int, Buffer]:
    """In place; returns which outputs stood for buffers."""
    graph = lowered.graph
    lengths, starts = add_inputs(graph, ["lengths", "starts"])
    for index, (cached, kept) in enumerate(zip(sites, stored, strict=True)):
        rewrite_site(lowered.module, cached.site, index, (lengths, starts), kept)
    buffers = _drop_outputs(graph, sites)
    graph.eliminate_dead_code()
    for cached in sites:
        for buffer in (cached.key, cached.value):
            _drop_buffer(graph, buffer, cached.site.layer)
    accept_any_strides(graph)
    clean_up(lowered.module)
    return buffers


def _drop_outputs(graph: fx.Graph, sites: Sequence[CachedSite]) -> dict[int, Buffer]:
    output = next(node for node in graph.nodes if node.op == "output")
    made = {buffer.written: buffer for cached in sites for buffer in (cached.key, cached.value)}
    returned = list(output.args[0])
    buffers = {index: made[node] for index, node in enumerate(returned) if node in made}
    output.args = (tuple(None if index in buffers else node for index, node in enumerate(returned)),)
    return buffers


def _drop_buffer(graph: fx.Graph, buffer: Buffer, layer: str) -> None:
    written, source = buffer.written, buffer.written.args[1]
    _erase(graph, written, layer)
    for write in (source, *source.users) if isinstance(source, fx.Node) else ():
        if operation(write) == "index_put_":
            _erase(graph, write, layer)
    graph.eliminate_dead_code()
    # A tensor made in the graph is dead code by now.
    if buffer.is_input:
        _erase(graph, buffer.tensor, layer)


def _erase(graph: fx.Graph, node: fx.Node, layer: str) -> None:
    if node.users:
        reader = next(iter(node.users))
        raise UnsupportedModelError(
            f"{layer}: what its cache holds is also read by {operation(reader)}, and not by its attention alone"
        )
    graph.erase_node(node)
