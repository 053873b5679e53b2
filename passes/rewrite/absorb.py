"""Absorb: where keys and values are linear maps of narrower rows, the rows are attended to in their place.

Queries are multiplied by the maps of the keys, and what attention gives by the map of the values: the weights that the
model applies to every token that it sees are applied to the new tokens alone. What results is a graph like any other,
whose attention has a single head of keys and values, for matchers to find anew. The weights stay the model's own.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, ops
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.export import bind
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.edit import copy_of
from kvmix_compile.passes.graph.evaluate import evaluate
from kvmix_compile.passes.graph.record import PassRecord
from kvmix_compile.passes.graph.rounding import TOLERANCE, difference
from kvmix_compile.passes.graph.vocabulary import as_node, graph_inputs, operation
from kvmix_compile.passes.match.cut import linear_sources
from kvmix_compile.passes.match.latents import Latents, Piece, channels, find_latents
from kvmix_compile.passes.match.sites import FEW, AttentionSite, few_tokens


def absorb(captured: Captured, sites: Sequence[AttentionSite]) -> tuple[Captured, PassRecord]:
    """The captured model with narrower rows attended to, where that saves more numbers than it costs products; the same
    object where it does nowhere.
    """
    found, left = list[Latents](), list[str]()
    for site in sites:
        try:
            latents = find_latents(site, captured)
        except UnsupportedModelError as error:
            left.append(f"keys and values made of fewer numbers: {error}")
            continue
        if latents is not None and latents.pays:
            found.append(latents)
        elif latents is not None:
            left.append(
                f"keys and values made of {latents.saving:.2g} times fewer numbers: to attend to these takes "
                f"{latents.arithmetic:.2g} times as many products"
            )
    absorbed = _absorbed(captured, found) if found else captured
    return absorbed, PassRecord("latents", _counted(map(_described, found)), _counted(left))


def _described(latents: Latents) -> str:
    return f"{latents.numbers} numbers a token instead of {latents.site.key_elements + latents.site.value_elements}"


def _counted(sentences: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{number} sites: {sentence}" for sentence, number in Counter(sentences).items())


def _absorbed(captured: Captured, found: Sequence[Latents]) -> Captured:
    graph, copies = copy_of(captured.graph)
    module = bind(captured.module, graph)
    maps = [_Absorption(captured, graph, copies, latents).run() for latents in found]
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    for latents, of_site in zip(found, maps, strict=True):
        for piece, matrix in of_site.items():
            _check_linear(piece, evaluate(module, matrix, {}), captured, latents.site.layer)
    return replace(captured, module=module)


@torch.no_grad()
def _check_linear(piece: Piece, matrix: Tensor, captured: Captured, layer: str) -> None:
    """Raise UnsupportedModelError unless the matrix `[heads, width, dim]` does what the graph does, on random rows."""
    row = piece.row.meta["val"]
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(*FEW, channels(piece.row), generator=generator).to(row.device, row.dtype)
    known = few_tokens(captured) | {piece.row: numbers if row.dim() == 3 else numbers[:, None]}
    expected = evaluate(captured.module, piece.node, known).float()
    found = torch.einsum("btw,hwd->bhtd", numbers, matrix).float()
    if not difference(found, expected) <= TOLERANCE[row.dtype]:
        raise UnsupportedModelError(
            f"{layer}: its keys and values are made of fewer numbers otherwise than by a linear map of each token, "
            "which is not supported"
        )


class _Absorption:
    """Edits a copy of the captured graph at one site. `copies`: what each of its nodes became."""

    def __init__(self, captured: Captured, graph: fx.Graph, copies: dict[fx.Node, fx.Node], latents: Latents) -> None:
        self.captured, self.graph, self.copies, self.latents = captured, graph, copies, latents
        self.heads = latents.site.query_heads
        self.one_head: dict[fx.Node, fx.Node] = {}
        self.mapped: dict[tuple[fx.Node, fx.Node], Any] = {}

    def run(self) -> dict[Piece, fx.Node]:
        """Returns the matrices `[heads, width, dim]` that queries, or what attention gives, are multiplied by."""
        latents, value_row = self.latents, self.latents.value.row
        output = self.copies[latents.site.output]
        with self.graph.inserting_before(output if latents.scores is None else self.copies[latents.scores]):
            matrices = {piece: self._matrix(piece) for piece in latents.key if not piece.is_row}
            scored = self._queries_of_rows(matrices)
            # Where values are among what is scored, they come first.
            order = [row for row in latents.rows if row in scored]
            query = self._joined([scored[row] for row in order])
            beside = self._joined([self._of_one_head(row) for row in order if row is not value_row])
            key = self._joined([self._of_one_head(value_row), beside]) if value_row in scored else beside
            self._score(query, self._of_every_head(key))
        with self.graph.inserting_before(output):
            self._weigh(self._of_every_head(self._of_one_head(value_row)))
            if not latents.value.is_row:
                matrices[latents.value] = self._matrix(latents.value)
        self._multiply_output(output, matrices.get(latents.value))
        return matrices

    def _score(self, query: fx.Node, key: fx.Node) -> None:
        """Let the attention's scores be of these."""
        output, scores = self.copies[self.latents.site.output], self.latents.scores
        if scores is None:
            output.args = (query, key, *output.args[2:])
            # By default it would follow from the width of the queries.
            output.kwargs = {**output.kwargs, "scale": self.latents.site.score_function.scale}
            return
        transposed = self.graph.call_function(ops.aten.transpose.int, (key, 2, 3))
        transposed.meta = {**key.meta, "val": key.meta["val"].mT}
        self.copies[scores].args = (query, transposed)

    def _weigh(self, value: fx.Node) -> None:
        """Let the attention be to these values."""
        output, place = self.copies[self.latents.site.output], 2 if self.latents.scores is None else 1
        output.args = (*output.args[:place], value, *output.args[place + 1 :])

    def _queries_of_rows(self, matrices: dict[Piece, fx.Node]) -> dict[fx.Node, fx.Node]:
        """For each row that is scored, the queries `[batch, heads, tokens, width]` that score it."""
        scored: dict[fx.Node, fx.Node] = {}
        query, begin = self.copies[self.latents.site.query], 0
        for piece in self.latents.key:
            part = self._new(ops.aten.slice.Tensor, (query, 3, begin, begin + piece.dim), query, piece.dim)
            begin += piece.dim
            if piece in matrices:
                operands = ("bhtd,hwd->bhtw", [part, matrices[piece]])
                part = self._new(ops.aten.einsum.default, operands, query, channels(piece.row))
            if piece.row in scored:
                part = self._new(ops.aten.add.Tensor, (scored[piece.row], part), query, channels(piece.row))
            scored[piece.row] = part
        return scored

    def _multiply_output(self, output: fx.Node, matrix: fx.Node | None) -> None:
        """Let whatever uses what attention gives have it multiplied by the map of the values."""
        of_values = output.meta["val"]
        output.meta["val"] = of_values.new_empty((*of_values.shape[:-1], channels(self.latents.value.row)))
        if matrix is None:
            return
        users = list(output.users)
        with self.graph.inserting_after(output):
            operands = ("bhtw,hwd->bhtd", [output, matrix])
            product = self._new(ops.aten.einsum.default, operands, output, self.latents.value.dim)
        for user in users:
            user.replace_input_with(output, product)

    def _new(self, operator: Any, arguments: tuple, like: fx.Node, dim: int) -> fx.Node:
        """A node whose value is as that of `like`, but for its last dimension."""
        node = self.graph.call_function(operator, arguments)
        value = like.meta["val"]
        node.meta = {**like.meta, "val": value.new_empty((*value.shape[:-1], dim))}
        return node

    def _joined(self, parts: Sequence[fx.Node]) -> fx.Node:
        """Side by side along the channels."""
        if len(parts) == 1:
            return parts[0]
        return self._new(ops.aten.cat.default, (list(parts), -1), parts[0], sum(map(channels, parts)))

    def _of_one_head(self, row: fx.Node) -> fx.Node:
        """`[batch, 1, tokens, width]`."""
        copied = self.copies[row]
        value = copied.meta["val"]
        if value.dim() == 4:
            return copied
        if row not in self.one_head:
            node = self._new(ops.aten.unsqueeze.default, (copied, 1), copied, channels(row))
            node.meta["val"] = value.new_empty((value.shape[0], 1, *value.shape[1:]))
            self.one_head[row] = node
        return self.one_head[row]

    def _of_every_head(self, row: fx.Node) -> fx.Node:
        """`[batch, heads, tokens, width]`."""
        node = self._new(ops.aten.expand.default, (row, [-1, self.heads, -1, -1]), row, channels(row))
        batch, _, tokens, width = row.meta["val"].shape
        node.meta["val"] = row.meta["val"].new_empty((batch, self.heads, tokens, width))
        return node

    # Matrices: what the graph makes of the rows of a unit matrix, as if these were tokens of one text.

    def _matrix(self, piece: Piece) -> fx.Node:
        return self._computed(ops.aten.squeeze.dim, (self._of_units(piece.node, piece.row), 0))

    def _of_units(self, node: fx.Node, row: fx.Node) -> fx.Node:
        """What `node` is where the row is each of the unit vectors in turn."""
        if (node, row) not in self.mapped:
            self.mapped[node, row] = self._from_units(node, row)
        return self.mapped[node, row]

    def _from_units(self, node: fx.Node, row: fx.Node) -> fx.Node:
        width, dims = channels(row), row.meta["val"].dim()
        if node is row or (operation(node) == "linear" and node.args[0] is row):
            # A linear map of all unit vectors is its matrix, which need not be computed.
            made = (
                self._unit_vectors(row) if node is row else self._computed(ops.aten.t.default, (self._weights(node),))
            )
            for _ in range(dims - 2):
                made = self._computed(ops.aten.unsqueeze.default, (made, 0))
            return made
        sources = set(linear_sources(node, self.captured.dataflow))

        def argument(source: fx.Node) -> Any:
            if source in sources:
                return self._of_units(source, row)
            is_size = isinstance(source.meta.get("val"), torch.SymInt)
            return self._size(source, width) if is_size else self.copies[source]

        arguments, options = fx.map_arg((node.args, dict(node.kwargs)), argument)
        target = ops.aten.reshape.default if operation(node) == "view" else node.target
        return self._computed(target, arguments, options)

    def _weights(self, linear: fx.Node) -> fx.Node:
        return self.copies[as_node(linear.args[1])]

    def _unit_vectors(self, row: fx.Node) -> fx.Node:
        width, value = channels(row), row.meta["val"]
        node = self.graph.call_function(
            ops.aten.eye.default, (width,), {"dtype": value.dtype, "device": value.device, "pin_memory": False}
        )
        node.meta = {**row.meta, "val": value.new_empty((width, width))}
        return node

    def _size(self, node: fx.Node, tokens: int) -> int:
        """What a size is for one text of so many tokens."""
        size = node.meta["val"]
        for symbol, number in ((self.captured.batch, 1), (self.captured.tokens, tokens)):
            if statically_known_true(size == symbol):
                return number
        device = self.captured.parameter.device
        inputs = graph_inputs(self.captured.graph)
        known = {one: torch.zeros(1, tokens, dtype=torch.int64, device=device) for one in inputs}
        return int(evaluate(self.captured.module, node, known))

    def _computed(self, target: Any, arguments: Any, options: Any = None) -> fx.Node:
        """A node of sizes that are all numbers: what it yields is worked out from what its arguments do."""
        node = self.graph.call_function(target, arguments, options or {})
        values, of_options = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        node.meta = {"val": target(*values, **of_options)}
        return node
