"""Find sites: every place where keys and values are attended to, matched by structure.

An attention is either one `scaled_dot_product_attention` or a softmax between two matrix products. From it the
matcher walks back through layout operations to the keys and values as they were *before* the heads were repeated for
grouped queries.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kvmix_compile.kernels.format.shape import Shaped, SiteShape
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.dataflow import Dataflow
from kvmix_compile.passes.graph.evaluate import evaluate
from kvmix_compile.passes.graph.moves import device_of
from kvmix_compile.passes.graph.record import PassRecord
from kvmix_compile.passes.graph.vocabulary import (
    LAYOUT,
    argument,
    as_node,
    behind_layout,
    graph_inputs,
    is_active_dropout,
    operation,
    tensor_of,
    unarranged,
)
from kvmix_compile.passes.match.masks import Mask, Probe, ScoreFunction
from kvmix_compile.passes.match.sink_logits import SinkLogits

ATTENTION = "scaled_dot_product_attention"

# Rows and tokens that layouts are tried on.
FEW = (2, 3)

# How paths of modules begin: with the wrapper's attribute in export's graphs; in Dynamo's with the local variable that
# holds the model, or, of a forward behind a decorator, the tuple of its arguments.
_ROOT = re.compile(r"^(model|L\['(?P<variable>\w+)'\](\[(?P<index>\d+)\])?)\.?")


@dataclass(frozen=True)
class Attention:
    """Attention as the graph spells it. `query` `[batch, query heads, tokens, head_dim]`; `key` and `value` likewise,
    their heads perhaps repeated; `output` `[batch, query heads, tokens, value dim]`.

    Fused, it has a `mask` (or `is_causal`) and a `scale`. Spelled out, its `scores` go through whatever the model does
    to them and become the `softmax_input`.
    """

    layer: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    output: fx.Node
    mask: fx.Node | None = None
    is_causal: bool = False
    scale: float = 1.0
    scores: fx.Node | None = None
    softmax_input: fx.Node | None = None
    sink: SinkLogits | None = None

    @classmethod
    def match(cls, node: fx.Node, layer: str, dataflow: Dataflow) -> Self:
        """Match fused attention, or the softmax of attention that is spelled out. Raises UnsupportedModelError where
        it cannot be replaced.
        """
        return cls.fused(node, layer) if operation(node) == ATTENTION else cls.spelled_out(node, layer, dataflow)

    @classmethod
    def fused(cls, node: fx.Node, layer: str) -> Self:
        """Match `scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, scale=...)`."""
        query, key, value = (as_node(argument(node, i, name)) for i, name in enumerate(("query", "key", "value")))
        if argument(node, 4, "dropout_p", 0.0) != 0.0:
            raise UnsupportedModelError(f"{layer}: its attention dropout is active: call `model.eval()` first")
        scale = node.kwargs.get("scale")
        if isinstance(scale, fx.Node):
            raise UnsupportedModelError(
                f"{layer}: the scale of its attention scores is computed, which is not supported"
            )
        scale = float(scale) if isinstance(scale, int | float) else _shape(query)[-1] ** -0.5
        mask, is_causal = argument(node, 3, "attn_mask"), bool(argument(node, 5, "is_causal", False))
        return cls(layer, query, key, value, node, mask if isinstance(mask, fx.Node) else None, is_causal, scale)

    @classmethod
    def spelled_out(cls, softmax: fx.Node, layer: str, dataflow: Dataflow) -> Self:
        """Match `softmax(f(query @ key^T)) @ value`, whatever pointwise f (scale, soft cap, mask) is, with a column of
        sink logits beside the scores or without.
        """
        scores = _scores_behind(softmax, dataflow, layer)
        sink = SinkLogits.match(scores, softmax, dataflow, layer)
        output, value = _weighted_sum_after(softmax, sink, layer)
        query, key = as_node(scores.args[0]), _transposed(as_node(scores.args[1]), layer)
        softmax_input = _unshifted(as_node(softmax.args[0]))
        return cls(layer, query, key, value, output, scores=scores, softmax_input=softmax_input, sink=sink)


@dataclass(frozen=True)
class AttentionSite(Shaped):
    """One attention whose keys and values are to be cached.

    `key` and `value` are `[batch, kv_heads, tokens, dim]`, before their heads are repeated; `query` and `output` have
    `query_heads`. `sink_logits`: as many numbers as there are query heads, of any shape (sink_logits.py).
    `values_are_keys`: a token's whole key is its value followed by `key`, and a query has channels for both. `readers`:
    later attentions that read the same keys and values, which are stored once; each is as a site by itself would be.
    """

    layer: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    output: fx.Node
    query_heads: int
    shape: SiteShape
    score_function: ScoreFunction
    sink_logits: fx.Node | None = None
    values_are_keys: bool = False
    readers: tuple[Self, ...] = ()

    @property
    def mask(self) -> Mask:
        return self.score_function.mask

    @property
    def attentions(self) -> tuple[Self, ...]:
        """All that read what the site stores, in the graph's order."""
        return (self, *self.readers)

    def mapped(self, nodes: Mapping[fx.Node, fx.Node]) -> Self:
        """The same site in a copy of its graph, where `nodes` says what each node became."""
        return replace(
            self,
            query=nodes[self.query],
            key=nodes[self.key],
            value=nodes[self.value],
            output=nodes[self.output],
            sink_logits=None if self.sink_logits is None else nodes[self.sink_logits],
            readers=tuple(reader.mapped(nodes) for reader in self.readers),
        )

    @property
    def attention(self) -> str:
        """What attends to what, and how, in a few words."""
        others = ["sink logits"] * (self.sink_logits is not None) + ["values are keys"] * self.values_are_keys
        others += [f"read by {len(self.readers)} more"] * bool(self.readers)
        return ", ".join([str(self.score_function), *others])


@dataclass(frozen=True)
class Refusal:
    """An attention that was seen and cannot be given a cache, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class Sites:
    """What was found in a graph."""

    matched: tuple[AttentionSite, ...]
    refused: tuple[Refusal, ...]

    @property
    def record(self) -> PassRecord:
        """How many attentions of each kind were matched, and what was refused."""
        kinds = Counter(site.attention for site in self.matched)
        skipped = tuple(f"{refusal.layer}: {refusal.reason}" for refusal in self.refused)
        return PassRecord("sites", tuple(f"{number} {kind}" for kind, number in kinds.items()), skipped)


def find_sites(captured: Captured) -> Sites:
    """Every attention of the graph: matched, or refused with a reason. Windows beyond the model's context are none.

    Raises CaptureError where the graph holds for fewer tokens than the model has positions.
    """
    dataflow, probe = captured.dataflow, Probe(captured)
    matched: list[AttentionSite] = []
    refused: list[Refusal] = []
    for layer, node in named(_candidates(captured, dataflow)):
        try:
            attention = Attention.match(node, layer, dataflow)
            matched.append(_site(attention, _score_function(attention, probe), captured))
        except UnsupportedModelError as error:
            refused.append(Refusal(layer, str(error).removeprefix(f"{layer}: ")))
    return Sites(stored_once(matched), tuple(refused))


def stored_once(attentions: Iterable[AttentionSite]) -> tuple[AttentionSite, ...]:
    """Of attentions in the graph's order those that store keys and values, the others among their `readers`.

    Layers that are given the keys and values of an earlier one read what that stores, if their masks are the same: of
    other windows other tokens are kept.
    """
    sites: dict[Hashable, AttentionSite] = {}
    for attention in attentions:
        stores = attention.key, attention.value, attention.values_are_keys
        read = *stores, attention.score_function.mask, attention.query_heads
        first = sites.get(read)
        sites[read] = attention if first is None else replace(first, readers=(*first.readers, attention))
    return tuple(sites.values())


def _candidates(captured: Captured, dataflow: Dataflow) -> Iterable[fx.Node]:
    """The nodes that are attention, or look like it: fused ones, and softmaxes over scores of tokens against tokens."""
    for node in captured.graph.nodes:
        looks_alike = (
            operation(node) == "softmax" and node in dataflow.token_dependent and _is_over_tokens(node, captured)
        )
        if operation(node) == ATTENTION or looks_alike:
            yield node


def _is_over_tokens(node: fx.Node, captured: Captured) -> bool:
    value, tokens = tensor_of(node), captured.tokens
    if value is None or value.dim() < 3 or not statically_known_true(value.shape[-2] == tokens):
        return False
    return any(statically_known_true(value.shape[-1] == size) for size in (tokens, tokens + 1))


def named(nodes: Iterable[fx.Node]) -> list[tuple[str, fx.Node]]:
    """Each attention with the path of the module that it was traced in, made unique."""
    taken: dict[str, int] = {}
    named = []
    for index, node in enumerate(nodes):
        layer = module_path(node) or f"attention {index}"
        taken[layer] = taken.get(layer, 0) + 1
        named.append((layer if taken[layer] == 1 else f"{layer} ({taken[layer]})", node))
    return named


def module_path(node: fx.Node) -> str:
    """The path in the user's model of the innermost module that `node` was traced in, or an empty string."""
    stack = _module_stack(node)
    return _ROOT.sub("", stack[-1]) if stack else ""


def traced_model(node: fx.Node, variables: Mapping[str, Any]) -> object:
    """What the path of the outermost module begins with in a graph of Dynamo: one of the traced function's local
    `variables`, or an item of one; None where there is no such thing.
    """
    root = next((match for path in _module_stack(node)[:1] if (match := _ROOT.match(path))), None)
    if root is None or root["variable"] is None:
        return None
    held = variables.get(root["variable"])
    if root["index"] is None:
        return held
    return held[int(root["index"])] if isinstance(held, tuple) else None


def _module_stack(node: fx.Node) -> list[str]:
    """The paths of the modules that `node` was traced in, outermost first."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def _score_function(attention: Attention, probe: Probe) -> ScoreFunction:
    if attention.scores is not None and attention.softmax_input is not None:
        return probe.score_function(attention.scores, attention.softmax_input, attention.sink, attention.layer)
    return ScoreFunction(attention.scale, 0.0, *_fused_mask(attention, probe))


def _site(attention: Attention, score_function: ScoreFunction, captured: Captured) -> AttentionSite:
    layer = attention.layer
    query, output = _before_flattening(attention.query, captured), _after_flattening(attention.output, captured)
    query_heads, _ = _heads_and_dim(query, captured, f"{layer}: its queries")
    _heads_and_dim(output, captured, f"{layer}: what its attention gives")
    key = _before_repeat(attention.key, query_heads, captured)
    value = _before_repeat(attention.value, query_heads, captured)
    beside = _beside_value(key, value)
    key = beside or key
    kv_heads, key_dim = _heads_and_dim(key, captured, f"{layer}: its keys")
    value_heads, value_dim = _heads_and_dim(value, captured, f"{layer}: its values")
    if kv_heads != value_heads or query_heads % kv_heads:
        raise unequal_heads(layer, query_heads, kv_heads, value_heads)
    if len(score_function.slopes) not in (0, 1, query_heads):
        raise UnsupportedModelError(
            f"{layer}: the bias on its attention scores is for {len(score_function.slopes)} of {query_heads} heads"
        )
    _check_devices(layer, (query, key, value, output))
    if attention.sink is not None:
        attention.sink.check(captured.module, few_tokens(captured), query_heads, layer)
    return AttentionSite(
        layer=layer,
        query=query,
        key=key,
        value=value,
        output=output,
        query_heads=query_heads,
        shape=SiteShape(kv_heads, key_dim, value_dim, window=score_function.mask.size),
        score_function=score_function,
        sink_logits=attention.sink.logits if attention.sink is not None else None,
        values_are_keys=beside is not None,
    )


def _check_devices(layer: str, nodes: Iterable[fx.Node]) -> None:
    """Raise UnsupportedModelError unless all these nodes give what they do on one device."""
    devices = dict.fromkeys(str(device_of(node)) for node in nodes)
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"{layer}: its queries, keys and values are made on several devices ({', '.join(devices)}), and what is "
            "cached of a layer is kept on one: load the model with a device_map that puts all of a layer on one device"
        )


def _fused_mask(attention: Attention, probe: Probe) -> tuple[Mask, tuple[float, ...]]:
    if attention.mask is not None:
        return probe.mask_and_slopes(attention.mask, attention.layer)
    if attention.is_causal:
        return Mask("causal"), ()
    raise unmasked(attention.layer)


def unequal_heads(layer: str, query_heads: int, key_heads: int, value_heads: int) -> UnsupportedModelError:
    """The error for numbers of heads that do not go together."""
    return UnsupportedModelError(
        f"{layer}: {query_heads} query heads attend to {key_heads} heads of keys and {value_heads} of values, where "
        "keys and values must have equally many heads, and queries a multiple"
    )


def unmasked(layer: str) -> UnsupportedModelError:
    """The error for attention without a mask."""
    return UnsupportedModelError(
        f"{layer}: its attention has no mask, so that a token attends to later ones: an encoder or a bidirectional "
        "model has no KV cache to compress"
    )


def _unshifted(node: fx.Node) -> fx.Node:
    """What a softmax is of, before the largest of each query's scores is taken from all of them: that changes no
    weight.
    """
    if operation(node) != "sub" or node.kwargs or len(node.all_input_nodes) != 2:
        return node
    scores, largest = map(as_node, node.args)
    if operation(largest) == "getitem" and largest.args[1] == 0:
        largest = as_node(largest.args[0])
    last = (-1, len(_shape(scores)) - 1)
    is_largest = operation(largest) in ("max", "amax") and largest.args[0] is scores
    return scores if is_largest and argument(largest, 1, "dim") in (*last, *([axis] for axis in last)) else node


def _scores_behind(softmax: fx.Node, dataflow: Dataflow, layer: str) -> fx.Node:
    """The matrix product that the softmax's input comes from, and all of it that depends on tokens."""
    open_ends = {as_node(softmax.args[0])}
    while True:
        node = max(open_ends)  # the last of them in the graph
        open_ends.remove(node)
        if operation(node) == "matmul" and not open_ends:
            return node
        behind = [source for source in node.all_input_nodes if source in dataflow.token_dependent]
        if operation(node) == "matmul" or not behind:
            other = unarranged(max(open_ends) if behind else node)
            raise UnsupportedModelError(
                f"{layer}: its attention weights are not a softmax over query-key products alone: what "
                f"{operation(other)} gives of the tokens takes part"
            )
        open_ends.update(behind)


def _weighted_sum_after(softmax: fx.Node, sink: SinkLogits | None, layer: str) -> tuple[fx.Node, fx.Node]:
    """The matrix product of attention weights and values, and the values."""
    weights, has_column = softmax, sink is not None
    while True:
        users = list(weights.users)
        if len(users) != 1:
            raise UnsupportedModelError(
                f"{layer}: its attention weights are used elsewhere too, so they cannot be fused away"
            )
        user = users[0]
        if is_active_dropout(user):
            raise UnsupportedModelError(f"{layer}: its attention dropout is active: call `model.eval()` first")
        if operation(user) == "matmul" and user.args[0] is weights and not has_column:
            return user, as_node(user.args[1])
        if sink is not None and has_column and sink.dropped_by(user):
            weights, has_column = user, False
            continue
        if operation(user) not in ("to", "dropout", "contiguous", "clone", "expand", "view", "reshape"):
            raise UnsupportedModelError(
                f"{layer}: {operation(user)} is applied to its attention weights, which is not supported"
            )
        weights = user


def _transposed(key: fx.Node, layer: str) -> fx.Node:
    """The keys `[.., tokens, head_dim]` of which `key` `[.., head_dim, tokens]` is the transpose."""
    *_, node = behind_layout(key, {"to", "contiguous", "clone"})
    if operation(node) == "mT":
        return as_node(node.args[0])
    rank = len(_shape(node))
    swapped = list(range(rank - 2)) + [rank - 1, rank - 2]
    if operation(node) == "permute" and [axis % rank for axis in node.args[1]] == swapped:  # type: ignore[union-attr, operator]
        return as_node(node.args[0])
    if operation(node) == "transpose" and {axis % rank for axis in node.args[1:3]} == {rank - 1, rank - 2}:  # type: ignore[operator]
        return as_node(node.args[0])
    raise UnsupportedModelError(f"{layer}: its scores are not the product of queries and transposed keys")


def _before_repeat(node: fx.Node, query_heads: int, captured: Captured) -> fx.Node:
    """The keys or values before their heads are repeated: the earliest node of the layout chain that still has its
    shape `[batch, heads, tokens, dim]`, and whose repetition gives exactly `node`.
    """
    dim = _shape(node)[-1]
    best = node
    for source in islice(behind_layout(node, LAYOUT - {"to"}), 1, None):
        if _is_heads(source, captured) and _shape(source)[-1] == dim and _repeats(source, node, query_heads, captured):
            best = source
    return best


def _beside_value(key: fx.Node, value: fx.Node) -> fx.Node | None:
    """What follows the value in a key that is these two, side by side; None for any other key."""
    if operation(key) != "cat" or argument(key, 1, "dim", 0) not in (-1, 3) or len(parts := list(key.args[0])) != 2:  # type: ignore[arg-type]
        return None
    return as_node(parts[1]) if parts[0] is value else None


def _before_flattening(node: fx.Node, captured: Captured) -> fx.Node:
    """The `[batch, heads, tokens, dim]` that `node` `[batch * heads, tokens, dim]` is a view of, if it is one."""
    if len(_shape(node)) == 3:
        for source in behind_layout(node):
            if _is_heads(source, captured) and _repeats(source, node, _shape(source)[1], captured):
                return source
    return node


def _after_flattening(node: fx.Node, captured: Captured) -> fx.Node:
    """The `[batch, heads, tokens, dim]` that `node` `[batch * heads, tokens, dim]` is viewed as, and nothing else."""
    users = list(node.users)
    if len(_shape(node)) == 3 and len(users) == 1 and operation(users[0]) in ("view", "reshape"):
        return users[0] if _is_heads(users[0], captured) and _shape(users[0])[3] == _shape(node)[2] else node
    return node


def _repeats(source: fx.Node, repeated: fx.Node, query_heads: int, captured: Captured) -> bool:
    """Whether `repeated` is `source` with each head repeated in place for its group of queries, seen on a probe."""
    heads, dim = _shape(source)[1], _shape(source)[-1]
    if query_heads % heads:
        return False
    batch, tokens = FEW
    numbers = distinct_numbers(batch, heads, tokens, dim, device=source.meta["val"].device)
    return is_repeat(captured.module, repeated, numbers, query_heads, few_tokens(captured) | {source: numbers})


def few_tokens(captured: Captured) -> dict[fx.Node, Tensor]:
    """Values for the graph's inputs, for what depends on their shapes alone: FEW rows and tokens."""
    inputs = graph_inputs(captured.graph)
    return {node: torch.zeros(FEW, dtype=torch.int64, device=node.meta["val"].device) for node in inputs}


def distinct_numbers(*shape: int, device: torch.device) -> Tensor:
    """Float32 of this shape, no number twice."""
    return torch.arange(math.prod(shape), dtype=torch.float32, device=device).reshape(shape)


def is_repeat(
    module: fx.GraphModule,
    node: fx.Node,
    source: Tensor,
    query_heads: int,
    known: Mapping[fx.Node, Any],
    tokens: int | None = None,
) -> bool:
    """Whether `node`, evaluated on `known`, is `source` `[batch, heads, tokens, dim]` itself, or with each head
    repeated in place for its group of queries; of the first `tokens` tokens where that is given. Batch and heads may be
    one dimension.
    """
    result, source = evaluate(module, node, known), source[:, :, :tokens]
    repeated = source.repeat_interleave(query_heads // source.shape[1], dim=1)
    found = [source, repeated] if result.dim() == 4 else [source.flatten(0, 1), repeated.flatten(0, 1)]
    return any(torch.equal(result, expected) for expected in found)


def _heads_and_dim(node: fx.Node, captured: Captured, what: str) -> tuple[int, int]:
    if not _is_heads(node, captured):
        raise UnsupportedModelError(
            f"{what} have the shape {list(_shape(node))}, where [batch, heads, tokens, head_dim] is needed"
        )
    _, heads, _, dim = _shape(node)
    return heads, dim


def _is_heads(node: fx.Node, captured: Captured) -> bool:
    """Whether `node` is `[batch, heads, tokens, dim]` with the graph's own batch and tokens."""
    shape = _shape(node)
    return (
        len(shape) == 4
        and isinstance(shape[1], int)
        and isinstance(shape[3], int)
        and statically_known_true(shape[0] == captured.batch)
        and statically_known_true(shape[2] == captured.tokens)
    )


def _shape(node: fx.Node) -> tuple:
    value = tensor_of(node)
    return tuple(value.shape) if value is not None else ()
