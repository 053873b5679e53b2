"""Static cache: find attention over transformers' StaticCache in a graph of Dynamo, lowered to ATen.

A layer's keys (and likewise its values) lie in a *buffer* `[batch, kv_heads, slots, dim]`, an input of the graph or
made in it. Whatever the layer does with it, four forms remain, by what is written and what attention then reads:

    indexed   buffer.index_copy_(2, position, new)                              the buffer
    rolled    buffer.copy_(roll(buffer, -1) with the last slot = new)           the buffer
    joined    full = cat(part of the buffer, new); buffer.copy_(full[-slots:])  full
    fresh     buffer.copy_(new[-slots:])                                        new

The last three belong to sliding-window layers, whose buffer holds a window and no more.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.passes.capture.dynamo import Lowered
from kvmix_compile.passes.capture.sizes import size_hint
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.dataflow import Dataflow
from kvmix_compile.passes.graph.evaluate import evaluate
from kvmix_compile.passes.graph.vocabulary import (
    LAYOUT,
    as_node,
    behind_layout,
    graph_inputs,
    operation,
    tensor_of,
    unarranged,
)
from kvmix_compile.passes.match.masks import Mask, ScoreFunction, unbiased
from kvmix_compile.passes.match.projections import is_projection
from kvmix_compile.passes.match.scores import function_of, scale_and_softcap
from kvmix_compile.passes.match.sink_logits import SinkLogits
from kvmix_compile.passes.match.sites import (
    ATTENTION,
    Attention,
    AttentionSite,
    is_repeat,
    module_path,
    named,
    stored_once,
    unequal_heads,
    unmasked,
)

Form = Literal["indexed", "rolled", "joined", "fresh"]

# The dimension of tokens in `[batch, kv_heads, slots, dim]`.
_TOKENS = (2, -2)
_CREATIONS = frozenset({"zeros", "empty", "full", "new_zeros", "new_empty"})


@dataclass(frozen=True)
class Buffer:
    """The keys or the values of one layer in a StaticCache.

    tensor: the buffer before this call: an input, or where it is made.
    written: the buffer after it.
    new: what is added, `[batch, kv_heads, tokens, dim]`.
    read: what attention sees, past and new.
    position: of the form "indexed", the slots that `new` goes to, int64 `[tokens]`.
    slot: of the form "rolled", the one that it goes to, int64 `[1]`.
    holds_all: no token has left it before this call.
    """

    tensor: fx.Node
    written: fx.Node
    new: fx.Node
    read: fx.Node
    form: Form
    position: fx.Node | None = None
    slot: fx.Node | None = None
    holds_all: bool = True

    @property
    def is_input(self) -> bool:
        return self.tensor.op == "placeholder"

    @property
    def slots(self) -> Any:
        return self.tensor.meta["val"].shape[2]


@dataclass(frozen=True)
class CachedSite:
    """An attention over a StaticCache: `site`, whose `key` and `value` are the new ones, and the buffers behind it.

    `mask`: the node that says which slots are attended to, `[.., tokens, slots read]`; None: the new tokens attend to
    each other causally, and to nothing else, or one new token to all that the buffer holds. Where attention is spelled
    out, `mask` is what the softmax is of when `scores` are zero; `sides` are the nodes that join the scores on the way.
    """

    site: AttentionSite
    key: Buffer
    value: Buffer
    mask: fx.Node | None
    scores: fx.Node | None
    sides: frozenset[fx.Node]


def find_cached_sites(lowered: Lowered) -> tuple[CachedSite, ...]:
    """Every attention over a StaticCache; attention over anything else is left alone.

    Raises UnsupportedModelError, naming the layer, for attention over a cache that cannot be replaced, and where the
    cache is one that grows by concatenation.
    """
    return tuple(_stored_once(list(_Finder(lowered).sites())))


def _stored_once(cached: list[CachedSite]) -> Iterator[CachedSite]:
    """Those of the sites that store keys and values, in their order, with those that read the same by the same mask
    among their readers.
    """
    by_mask: dict[frozenset[fx.Node], list[AttentionSite]] = {}
    for one in cached:
        by_mask.setdefault(one.sides, []).append(one.site)
    storing = {site.output: site for attentions in by_mask.values() for site in stored_once(attentions)}
    for one in cached:
        if (site := storing.get(one.site.output)) is not None:
            yield replace(one, site=site)


class _Finder:
    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.buffers = {buffer.read: buffer for buffer in _buffers(lowered.graph)}
        self.dataflow = Dataflow(lowered.graph, self._token_inputs())

    def _token_inputs(self) -> Iterator[fx.Node]:
        """The inputs that carry tokens: ids that are embedded, hidden states, and what the cache holds of them."""
        yield from (buffer.tensor for buffer in self.buffers.values())
        for node in self.lowered.graph.nodes:
            if operation(node) == "embedding":
                yield unarranged(as_node(node.args[1]))
        for node, value in self.example.items():
            is_weight = not isinstance(value, Tensor) or isinstance(value, nn.Parameter)
            if not is_weight and value.is_floating_point() and value.dim() == 3:
                yield node

    @cached_property
    def example(self) -> dict[fx.Node, Any]:
        """The real inputs that Dynamo traced with. What could be written to in place is a copy."""

        def safe(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value if value.is_floating_point() else value.clone()
            return size_hint(value) if isinstance(value, torch.SymInt) else value

        return {
            node: safe(value) for node, value in zip(graph_inputs(self.lowered.graph), self.lowered.inputs, strict=True)
        }

    def sites(self) -> Iterator[CachedSite]:
        attended = set[fx.Node]()
        for layer, node in named(self._candidates()):
            attention = Attention.match(node, layer, self.dataflow)
            key, value = self._buffer_behind(attention.key, layer), self._buffer_behind(attention.value, layer)
            if key is not None and value is not None:
                attended |= {key.tensor, value.tensor}
                yield self._site(attention, key, value)
            elif key is not None or value is not None:
                raise UnsupportedModelError(
                    f"{layer}: of its keys and values only the {'keys' if key else 'values'} are in the cache"
                )
            else:
                self._check_no_growing_cache(attention)
        for buffer in self.buffers.values():
            # What is overwritten as a whole can be another state, of linear attention for instance.
            if buffer.form != "fresh" and buffer.tensor not in attended:
                raise UnsupportedModelError(
                    f"{module_path(buffer.written)}: what it reads from its cache is worked on before it is attended "
                    "to, as in multi-head latent attention: use kvmix_compile.apply"
                )

    def _candidates(self) -> Iterator[fx.Node]:
        for node in self.lowered.graph.nodes:
            if operation(node) == ATTENTION or (operation(node) == "softmax" and self._reads_a_buffer(node)):
                yield node

    def _reads_a_buffer(self, softmax: fx.Node) -> bool:
        """Whether the softmax is of a matrix product with what is in a buffer, without a projection in between."""

        def is_between(node: fx.Node) -> bool:
            return operation(node) not in ("embedding", ATTENTION) and not is_projection(node, self.dataflow)

        return not self.buffers.keys().isdisjoint(self.dataflow.tokens_behind(softmax, through=is_between))

    def _buffer_behind(self, node: fx.Node, layer: str) -> Buffer | None:
        """The buffer that attention's keys or values are read from, through layout operations alone."""
        for current in behind_layout(node):
            if current in self.buffers:
                return self.buffers[current]
            if {unarranged(source) for source in (current, *current.all_input_nodes)} & self.written_inputs:
                raise UnsupportedModelError(
                    f"{layer}: it reads a cache that is written in a way that is not understood: use transformers' "
                    "StaticCache, or kvmix_compile.apply"
                )
        return None

    @cached_property
    def written_inputs(self) -> set[fx.Node]:
        """The inputs with heads, tokens and channels that the graph writes to in place."""
        return {
            node.args[0]
            for node in self.lowered.graph.nodes
            if isinstance(node.target, OpOverload) and node.target._schema.is_mutable
            if isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"
            if node.args[0].meta["val"].dim() == 4
        }

    def _site(self, attention: Attention, key: Buffer, value: Buffer) -> CachedSite:
        layer = attention.layer
        if key.form != value.form or key.position is not value.position:
            raise UnsupportedModelError(f"{layer}: its keys and values are written to the cache in different ways")
        function = self._score_function(attention, key)
        if attention.query.meta["val"].dim() != 4:
            raise UnsupportedModelError(
                f"{layer}: its queries have the shape {list(_hints(attention.query))}, where [batch, heads, tokens, "
                "head_dim] is needed: use kvmix_compile.apply"
            )
        query_heads, (_, kv_heads, _, key_dim) = attention.query.meta["val"].shape[1], key.new.meta["val"].shape
        _, value_heads, _, value_dim = value.new.meta["val"].shape
        if kv_heads != value_heads or query_heads % kv_heads:
            raise unequal_heads(layer, query_heads, kv_heads, value_heads)
        for node, buffer in ((attention.key, key), (attention.value, value)):
            self._check_written(buffer, layer)
            self._check_only_repeated(node, buffer, query_heads, layer)
        site = AttentionSite(
            layer=layer,
            query=attention.query,
            key=key.new,
            value=value.new,
            output=attention.output,
            query_heads=query_heads,
            shape=SiteShape(kv_heads, key_dim, value_dim, window=function.mask.size),
            score_function=function,
            sink_logits=self._sink_logits(attention, query_heads),
        )
        if attention.scores is not None and attention.softmax_input is not None:
            # With a column of sink logits the softmax's input is not of the mask's shape, what it is joined to is.
            masked = attention.softmax_input if attention.sink is None else attention.sink.scores
            return CachedSite(
                site, key, value, masked, attention.scores, self._joined_between(attention.scores, masked)
            )  # fmt: skip
        sides = frozenset({attention.mask} if attention.mask is not None else ())
        return CachedSite(site, key, value, attention.mask, None, sides)

    def _joined_between(self, first: fx.Node, last: fx.Node) -> frozenset[fx.Node]:
        """The nodes that feed the way from `first` to `last` from outside."""
        way = self.dataflow.between(first, last) | {last} - {first}
        return frozenset(source for node in way for source in node.all_input_nodes) - way - {first}

    def _sink_logits(self, attention: Attention, query_heads: int) -> fx.Node | None:
        if attention.sink is None:
            return None
        attention.sink.check(self.lowered.module, self.example, query_heads, attention.layer)
        return attention.sink.logits

    def _check_written(self, buffer: Buffer, layer: str) -> None:
        """A window is to end with the new tokens and begin with those before them, seen on numbers."""
        module, slots = self.lowered.module, _hints(buffer.tensor)[2]
        if buffer.form == "indexed":
            return
        if buffer.slot is not None:
            right = evaluate(module, buffer.slot, self.example).tolist() in ([-1], [slots - 1])
        else:
            old, new = self._bytes_like(buffer.tensor), self._bytes_like(buffer.new)
            known = self.example | {buffer.tensor: old.clone(), buffer.new: new}
            read, past = evaluate(module, buffer.read, known), _hints(buffer.read)[2] - new.shape[2]
            held = old[:, :, :past] if buffer.holds_all else old[:, :, 1:]
            expected = torch.cat([held, new], dim=2)
            written = evaluate(module, buffer.written, known)
            right = torch.equal(read, expected) and torch.equal(written, expected[:, :, -slots:])
        if not right:
            raise UnsupportedModelError(f"{layer}: its cache is not a window that ends with the new tokens")

    def _bytes_like(self, node: fx.Node) -> Tensor:
        """Random bytes of a node's shape: a buffer can be large, and layout operations do not care."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(256, _hints(node), generator=generator, dtype=torch.uint8).to(node.meta["val"].device)

    def _check_only_repeated(self, node: fx.Node, buffer: Buffer, query_heads: int, layer: str) -> None:
        """Between the buffer and attention, heads may be repeated and slots beyond the new tokens be cut off."""
        numbers = self._bytes_like(buffer.read)
        slots = _hints(node)[2]
        if not is_repeat(self.lowered.module, node, numbers, query_heads, self.example | {buffer.read: numbers}, slots):
            raise UnsupportedModelError(
                f"{layer}: what it reads from the cache is changed before it is attended to, otherwise than by "
                "repeating each head in place: use kvmix_compile.apply"
            )

    def _score_function(self, attention: Attention, buffer: Buffer) -> ScoreFunction:
        """The scale, the soft cap and, as far as the buffer tells, the window. The mask itself is looked at when the
        graph runs: in `generate` it is an input.
        """
        layer, rolls = attention.layer, buffer.form != "indexed"
        # Here `int` fixes a symbolic size: the window becomes part of the graph.
        mask = Mask("sliding", int(buffer.slots)) if rolls else Mask("causal")
        if attention.scores is not None and attention.softmax_input is not None:
            scale, softcap = self._spelled_out(attention.scores, attention.softmax_input, attention.sink, layer)
            return ScoreFunction(scale, softcap, mask)
        if attention.mask is not None:
            unbiased(evaluate(self.lowered.module, attention.mask, self.example), layer)
        elif not (attention.is_causal and buffer.form == "indexed") and buffer.form != "rolled":
            raise unmasked(layer)
        return ScoreFunction(attention.scale, 0.0, mask)

    def _spelled_out(
        self, scores: fx.Node, softmax_input: fx.Node, sink: SinkLogits | None, layer: str
    ) -> tuple[float, float]:
        graph = function_of(self.lowered.module, scores, softmax_input, sink, self.example)

        def run(value: Tensor) -> Tensor:
            # Rows and heads may be one dimension of the scores, and two where the mask is added.
            return graph(value).flatten(0, -3)

        like = scores.meta["val"]
        sizes = _hints(scores) if like.dim() == 3 else (1,) * (like.dim() - 2) + _hints(scores)[-2:]
        # In single precision at least, so that what is read off them is not rounded.
        no_scores = torch.zeros(sizes, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        # Padding differs from row to row: what all rows may attend to is enough to look at.
        allowed = unbiased(run(no_scores), layer).all(0)
        if not allowed.any():
            raise UnsupportedModelError(f"{layer}: its mask lets no token attend to anything")
        return scale_and_softcap(run, no_scores, allowed, torch.finfo(like.dtype).eps, layer)

    def _check_no_growing_cache(self, attention: Attention) -> None:
        """Keys that are returned from the graph are kept by a cache that is not static."""
        output = next(node for node in self.lowered.graph.nodes if node.op == "output")
        if not set(output.all_input_nodes).intersection(behind_layout(attention.key, LAYOUT | {"cat"})):
            return
        raise UnsupportedModelError(
            f"{attention.layer}: its keys and values are returned to a cache that grows, such as DynamicCache: "
            "generate with cache_implementation='static', pass a transformers.StaticCache, or pass use_cache=False; "
            "for any other cache use kvmix_compile.apply"
        )


def _buffers(graph: fx.Graph) -> Iterator[Buffer]:
    for node in graph.nodes:
        value = tensor_of(node)
        if operation(node) not in ("index_copy_", "copy_") or value is None or value.dim() != 4:
            continue
        arguments: Any = node.args
        tensor = as_node(arguments[0])
        if tensor.op != "placeholder" and operation(tensor) not in _CREATIONS:
            continue
        if operation(node) == "copy_":
            yield from _window(tensor, node, as_node(arguments[1]))
        elif arguments[1] in _TOKENS:
            yield Buffer(tensor, node, arguments[3], node, "indexed", arguments[2])


def _window(tensor: fx.Node, written: fx.Node, source: fx.Node) -> Iterator[Buffer]:
    """A sliding-window layer's buffer, `source` being what is copied to it."""
    for put in _writes_of_a_slot(source):
        rolled, index, new = cast(Any, put.args[:3])
        one_slot = isinstance(index, list | tuple) and len(index) == 3 and list(index[:2]) == [None, None]
        if one_slot and operation(rolled) == "roll" and rolled.args in [(tensor, [-1], [axis]) for axis in _TOKENS]:
            for whole in _of_every_row(new, tensor):
                yield Buffer(tensor, written, whole, written, "rolled", slot=index[2], holds_all=False)
        return
    full: Any = source.args[0] if operation(source) == "slice" and source.args[1] in _TOKENS else source
    if operation(full) == "cat" and full.args[1:] and full.args[1] in _TOKENS:
        held, new = full.args[0]
        if held is tensor or (operation(held) == "slice" and held.args[0] is tensor):
            # A buffer that is full makes room for the first of the new tokens.
            yield Buffer(tensor, written, new, full, "joined", holds_all=held is tensor or held.args[2] == 0)
    elif full is not tensor:
        yield Buffer(tensor, written, full, full, "fresh")


def _of_every_row(new: fx.Node, tensor: fx.Node) -> Iterator[fx.Node]:
    """The `[batch, kv_heads, 1, dim]` of a buffer that is written to a slot of it: of a single row PyTorch writes it
    without its batch.
    """
    _, heads, _, dim = tensor.meta["val"].shape
    for source in behind_layout(new, {"view", "reshape", "squeeze"}):
        value = tensor_of(source)
        if value is not None and value.dim() == 4 and value.shape[1:] == (heads, 1, dim):
            yield source
            return


def _writes_of_a_slot(node: fx.Node) -> list[fx.Node]:
    """The in-place writes that `node` shows: itself, or those to views of it."""
    return [write for write in (node, *node.users) if operation(write) == "index_put_"]


def _hints(node: fx.Node) -> tuple[int, ...]:
    return tuple(size_hint(size) for size in node.meta["val"].shape)
