"""Latents: what a site's keys and values are made of where the narrowest cut behind them is narrower than they are.

Keys are pieces side by side, each a linear map of one row of the cut: with multi-head latent attention, one of the
latent, and one of the rotary key, which all heads share. Values are a linear map of one row. Scores ``q . (W c)`` are
``(W^T q) . c``, and what attention gives, ``sum of w (W c)``, is ``W (sum of w c)``. So the rows themselves can be
attended to, as the keys and values of a single head.
"""

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.evaluate import evaluate
from kvmix_compile.passes.graph.vocabulary import operation, tensor_of
from kvmix_compile.passes.match.cut import linear_sources, narrowest_cut
from kvmix_compile.passes.match.sites import ATTENTION, FEW, AttentionSite, distinct_numbers, few_tokens


@dataclass(frozen=True)
class Piece:
    """`node` `[batch, heads, tokens, dim]` is a linear map of `row`, `[batch, tokens, width]` or `[batch, 1, tokens,
    width]`; of every head the row itself, if `is_row`.
    """

    node: fx.Node
    row: fx.Node
    is_row: bool

    @property
    def dim(self) -> int:
        return channels(self.node)


@dataclass(frozen=True)
class Latents:
    """What a site's keys and values are made of. `key`: pieces that follow each other along the channels of a key.
    `scores`: the product of queries and keys, where attention is spelled out.
    """

    site: AttentionSite
    key: tuple[Piece, ...]
    value: Piece
    scores: fx.Node | None = None

    @property
    def rows(self) -> tuple[fx.Node, ...]:
        """The rows of the cut, that of the values first."""
        return tuple(dict.fromkeys([self.value.row, *(piece.row for piece in self.key)]))

    @property
    def numbers(self) -> int:
        """Of all rows, a token."""
        return sum(map(channels, self.rows))

    @property
    def saving(self) -> float:
        """How many times fewer numbers the rows are than the keys and values of all heads."""
        return (self.site.key_elements + self.site.value_elements) / self.numbers

    @property
    def arithmetic(self) -> float:
        """How many times as many products it takes to attend to the rows as to the keys and values of a head."""
        scored = sum(map(channels, {piece.row for piece in self.key}))
        return (scored + channels(self.value.row)) / (self.site.key_dim + self.site.value_dim)

    @property
    def pays(self) -> bool:
        """Whether attending to the rows saves more numbers than it costs products."""
        return self.saving > self.arithmetic


def find_latents(site: AttentionSite, captured: Captured) -> Latents | None:
    """What a site's keys and values are made of; None where nothing narrower is found.

    Raises UnsupportedModelError, with the reason, where something narrower is found and cannot be attended to instead.
    """
    cut = narrowest_cut(site, captured)
    if cut is None or cut.numbers >= site.key_elements + site.value_elements:
        return None
    if site.readers:
        raise UnsupportedModelError("several attentions read them")
    if site.query_heads != site.kv_heads:
        raise UnsupportedModelError("its query heads share keys")
    scores = None if operation(site.output) == ATTENTION else _scores(site)
    key = tuple(_piece(node, cut.nodes, captured) for node in _side_by_side(site.key))
    value = _piece(site.value, cut.nodes, captured)
    latents = Latents(site, key, value, scores)
    if latents.pays and all(piece.row is value.row for piece in key):
        raise UnsupportedModelError("all of them make both keys and values")
    return latents


def _scores(site: AttentionSite) -> fx.Node:
    """The product of a site's queries and its transposed keys, where these, and its values, are used as they are."""
    transposed = next(iter(site.key.users))
    scores = next((user for user in transposed.users if operation(user) == "matmul"), None)
    as_they_are = scores is not None and scores.args == (site.query, transposed) and transposed.args[0] is site.key
    if scores is None or not as_they_are or operation(site.output) != "matmul" or site.output.args[1] is not site.value:
        raise UnsupportedModelError("its attention works on them before it uses them")
    return scores


def _side_by_side(key: fx.Node) -> list[fx.Node]:
    """What a key is a concatenation of, along its channels; else itself."""
    if operation(key) != "cat" or key.args[1] not in (-1, 3):
        return [key]
    return list(key.args[0])  # type: ignore[arg-type]


def _piece(node: fx.Node, cut: tuple[fx.Node, ...], captured: Captured) -> Piece:
    rows, pending, seen = set[fx.Node](), [node], set[fx.Node]()
    while pending:
        behind = pending.pop()
        if behind in cut:
            rows.add(behind)
        elif behind not in seen:
            seen.add(behind)
            pending += linear_sources(behind, captured.dataflow)
    if len(rows) != 1:
        raise UnsupportedModelError("some of its channels are made of several rows")
    (row,) = rows
    if not _is_row(row, captured):
        raise UnsupportedModelError("these are spread over its heads")
    return Piece(node, row, _is_for_every_head(row, node, captured))


def _is_row(node: fx.Node, captured: Captured) -> bool:
    """Whether `node` is `[batch, tokens, width]` or `[batch, 1, tokens, width]`."""
    value = tensor_of(node)
    if value is None or value.dim() not in (3, 4) or not isinstance(value.shape[-1], int):
        return False
    batch, *heads, tokens, _ = value.shape
    same = statically_known_true(batch == captured.batch) and statically_known_true(tokens == captured.tokens)
    return same and heads in ([], [1])


def _is_for_every_head(row: fx.Node, node: fx.Node, captured: Captured) -> bool:
    """Whether `node` is the row itself for every head, seen on a probe."""
    if channels(row) != channels(node):
        return False
    numbers = distinct_numbers(*FEW, channels(row), device=row.meta["val"].device)
    known = few_tokens(captured) | {row: numbers if row.meta["val"].dim() == 3 else numbers[:, None]}
    found = evaluate(captured.module, node, known)
    return torch.equal(found, numbers[:, None].expand_as(found))


def channels(node: fx.Node) -> int:
    """The last size of what a node yields."""
    return int(node.meta["val"].shape[-1])
