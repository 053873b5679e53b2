"""Rewrite: each site's attention becomes `kvmix::attend` on the cache, followed by `kvmix::append` to it; where chunks
are to be exact, `kvmix::attend_stepwise`, which is both.

The mask and everything only it needed dies, and the graph gains the cache's tensors as inputs. One graph serves
prefill, chunked prefill and decode.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.kernels.ops import append_arguments, attend_arguments
from kvmix_compile.kernels.weighting import Weighting
from kvmix_compile.passes.allocate.plan import StoredSite
from kvmix_compile.passes.capture.captured import MODEL, Captured
from kvmix_compile.passes.capture.export import bind
from kvmix_compile.passes.capture.single_nodes import CarriedState, SingleNode, StatefulModule
from kvmix_compile.passes.graph.edit import accept_any_strides, add_inputs, clean_up, copy_of
from kvmix_compile.passes.graph.moves import OnDevices, device_of
from kvmix_compile.passes.graph.record import PassRecord, recorded
from kvmix_compile.passes.match.masks import ScoreFunction
from kvmix_compile.passes.match.sites import AttentionSite
from kvmix_compile.passes.rewrite.carried import carry_states
from kvmix_compile.passes.rewrite.lengths import check_lengths
from kvmix_compile.passes.rewrite.positions import shift_positions
from kvmix_compile.passes.rewrite.powers import multiply_output, with_divided_inputs
from kvmix_compile.passes.rewrite.queries import with_changed_queries
from kvmix_compile.passes.rewrite.rotation import turn_back, with_rotated_values

# The six tensors of kernels.format.state.SiteState, in its order.
STATE_TENSORS = ("sink_key", "sink_value", "packed_key", "packed_value", "recent_key", "recent_value")


@dataclass(frozen=True)
class Rewritten:
    """The graph with its cache as inputs.

    `module` takes `(input_ids, position_ids, logit_positions, lengths, starts, *state, *carried)` where `lengths` and
    `starts` are int64 `[batch]` (tokens that each row holds; padding tokens that lead it in this call), `state` the six
    tensors of each site in turn, which it updates in place, and `carried` those of each stateful module, or None for
    each of them where nothing is held yet. It gives logits, or a tuple of logits and what `carried` is afterwards.
    `carried`: what the latter are. `score_functions`: of each attention. `equal_rows`: the model counts positions
    itself, the same for all rows: on from the first of `position_ids` where it takes none, else from the first of
    `lengths`. `passes`: what was done.
    """

    module: fx.GraphModule
    score_functions: tuple[ScoreFunction, ...]
    equal_rows: bool
    passes: tuple[PassRecord, ...] = ()
    carried: tuple[CarriedState, ...] = ()

    def apart(self, given: Any) -> tuple[Tensor, list[Tensor]]:
        """What `module` gave, as logits and what is carried on."""
        return (given[0], list(given[1:])) if self.carried else (given, [])


def rewrite(
    captured: Captured,
    sites: Sequence[AttentionSite],
    stored: Sequence[StoredSite],
) -> Rewritten:
    """A copy of the captured graph in which every site reads and writes a cache, each as `stored` says of it.

    Raises UnsupportedModelError where what is left of the graph computes with the number of rows or tokens.
    """
    graph, copies = copy_of(captured.graph)
    module = bind(captured.module, graph)
    lengths, starts = add_inputs(graph, ["lengths", "starts"])

    # All inputs are where the token ids are.
    here = device_of(captured.placeholder("input_ids"))
    counts = OnDevices(lengths, here), OnDevices(starts, here)

    def rewrite_sites() -> None:
        for index, (site, kept) in enumerate(zip(sites, stored, strict=True)):
            there = device_of(site.key)
            rewrite_site(module, site.mapped(copies), index, (counts[0].on(there), counts[1].on(there)), kept)
        graph.eliminate_dead_code()

    # A model that is given positions may count others besides, as Llama 4 does for the temperature of its softmax.
    counted = lengths if captured.has_position_input else copies[captured.placeholder("position_ids")]
    sites_done, _ = recorded("rewrite", module, rewrite_sites)
    states_done, carried = recorded("carried", module, lambda: carry_states(module, counts[1]))
    positions_done, shifted = recorded(
        "positions", module, lambda: shift_positions(graph, counted, here, captured.tokens)
    )
    accept_any_strides(graph)
    clean_up_done, _ = recorded("clean up", module, lambda: clean_up(module))
    check_lengths(graph, captured)
    passes = (sites_done, *([states_done] if carried else []), positions_done, clean_up_done)
    functions = tuple(attention.score_function for site in sites for attention in site.attentions)
    return Rewritten(module, functions, shifted, passes, carried)


def rebind(rewritten: Rewritten, model: nn.Module) -> Rewritten:
    """The same graph over the weights of `model`, which must be a copy of the model that it was made from."""
    graph, _ = copy_of(rewritten.module.graph)
    return replace(rewritten, module=over(model, graph, single_nodes(rewritten), constants(rewritten)))


def single_nodes(rewritten: Rewritten) -> dict[str, StatefulModule]:
    """What stateful modules its graph calls, by their names in it."""
    children = rewritten.module.named_children()
    return {name: child.stateful for name, child in children if isinstance(child, SingleNode)}


def constants(rewritten: Rewritten) -> dict[str, Tensor]:
    """The graph's own tensors, by their names in it."""
    return dict(rewritten.module.named_buffers(recurse=False))


def over(
    model: nn.Module, graph: fx.Graph, stateful: Mapping[str, StatefulModule], own: Mapping[str, Tensor]
) -> fx.GraphModule:
    """A rewritten graph over a model that it is right for, with its single nodes and constants."""
    root = nn.Module()
    root.add_module(MODEL, model)
    for name, one in stateful.items():
        root.add_module(name, SingleNode(model, one))
    for name, constant in own.items():
        root.register_buffer(name, constant, persistent=False)
    return bind(root, graph)


def rewrite_site(
    module: fx.GraphModule,
    site: AttentionSite,
    index: int,
    counts: tuple[fx.Node, fx.Node],
    stored: StoredSite,
) -> None:
    """Put the operators in the place of the `output` of each of the site's attentions, and its state behind the inputs
    of the module's graph.

    `index`: the site's number. `counts`: the inputs lengths and starts, on its device.
    """
    state, given = add_inputs(module.graph, [f"{name}_{index}" for name in STATE_TENSORS]), site
    for number, attention in enumerate(site.attentions):
        changed = _as_stored(module, attention, index, stored)
        # All read what the first of them is given, as it is stored.
        given = replace(changed, key=given.key, value=given.value) if number else changed
        attended = _attend_and_append(
            module, given, index, counts, state, stored, number=number, is_last=number == len(site.readers)
        )
        multiply_output(module, given, attended, index, stored)
        if stored.values_rotated:
            turn_back(module, given, attended, index)


def _as_stored(module: fx.GraphModule, site: AttentionSite, index: int, stored: StoredSite) -> AttentionSite:
    """The site with its keys and values as they are stored, and queries that go with them."""
    if stored.channel_order is not None:
        name = f"channel_order_{index}"
        constant = torch.tensor(stored.channel_order, device=site.key.meta["val"].device)
        module.register_buffer(name, constant, persistent=False)
        site = _with_ordered_channels(module.graph, site, name)
    # Divided first: what is rotated fits then, and so does what is turned back.
    site = with_divided_inputs(module, site, index, stored)
    return with_rotated_values(module, site, index) if stored.values_rotated else site


def _with_ordered_channels(graph: fx.Graph, site: AttentionSite, order: str) -> AttentionSite:
    """The site with its queries and keys in the order of channels that the graph's constant `order` holds. Their
    products are the same.
    """
    with graph.inserting_before(site.output):
        constant = graph.get_attr(order)

    def ordered(node: fx.Node) -> fx.Node:
        with graph.inserting_before(site.output):
            found = graph.call_function(torch.ops.kvmix.order_channels.default, (node, constant))
        found.meta = dict(node.meta)
        return found

    return replace(with_changed_queries(graph, site, of_keys=ordered), key=ordered(site.key))


def _attend_and_append(
    module: fx.GraphModule,
    site: AttentionSite,
    index: int,
    counts: tuple[fx.Node, fx.Node],
    state: Sequence[fx.Node],
    kept: StoredSite,
    *,
    number: int,
    is_last: bool,
) -> fx.Node:
    """Put the operators in the place of `site.output`, which is erased; returns the node that gives its values.
    `counts`: lengths and starts; `state`: the six tensors of the site's state. `number`: which of those it is that read
    the state; the last of them stores what is new.
    """
    output, (lengths, starts), graph = site.output, counts, module.graph
    if kept.exact_chunks and not is_last:
        # What is new is stored on the way, and the next is to find none of it.
        with graph.inserting_before(output):
            state = [graph.call_function(torch.ops.aten.clone.default, (tensor,)) for tensor in state]
    # In what the operators are given, nodes stand for tensors.
    new: dict[str, Any] = {"key": site.key, "value": site.value, "lengths": lengths, "starts": starts}
    chunk, stored, storage = Chunk(**new), SiteState(*cast(Any, state)), kept.layout.storage
    with graph.inserting_before(output):
        weighting = _weighting(module, site, f"slopes_{index}_{number}")
        given, extras = attend_arguments(cast(Any, site.query), chunk, stored, storage, weighting)
        operators = torch.ops.kvmix
        operator = operators.attend_stepwise if kept.exact_chunks else operators.attend
        attended = graph.call_function(operator.default, given, extras)
        attended.meta = dict(output.meta)
        if is_last and not kept.exact_chunks:
            # Tokens attend to the past as stored and to each other in full precision: what is new is stored afterwards.
            graph.call_function(operators.append.default, append_arguments(chunk, stored, storage))
    output.replace_all_uses_with(attended)
    graph.erase_node(output)
    return attended


def _weighting(module: fx.GraphModule, site: AttentionSite, name: str) -> Weighting:
    """How the site's scores are weighted, with nodes in the place of tensors. `name`: of a new constant for slopes."""
    graph, function, sink_logits, slopes = module.graph, site.score_function, None, None
    if site.sink_logits is not None:
        sink_logits = graph.call_function(torch.ops.aten.reshape.default, (site.sink_logits, [-1]))
    if function.slopes:
        of_heads = torch.tensor(function.slopes, device=site.key.meta["val"].device).expand(site.query_heads)
        module.register_buffer(name, of_heads.contiguous(), persistent=False)
        slopes = graph.get_attr(name)
    return Weighting(
        scale=function.scale,
        softcap=function.softcap,
        sliding_window=function.mask.size if function.mask.kind == "sliding" else 0,
        attention_chunk=function.mask.size if function.mask.kind == "chunked" else 0,
        sink_logits=cast(Any, sink_logits),
        slopes=cast(Any, slopes),
    )
