"""Lengths: the number of rows and of tokens may shape tensors, and may not become a value in one.

A rewritten graph is called with some of a text's tokens, and its captured sizes are theirs. Where the model reads
nothing off them but the extents of tensors and the positions of tokens, which are counted on from the cache, that makes
no difference. Everything else that a forward might do with them is refused here: compute with them, choose by them, or
take another path for some.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sympy import Basic, Integer, Symbol
from sympy.logic.boolalg import BooleanAtom
from torch import fx
from torch._ops import OpOverload
from torch.utils._sympy.printers import PythonPrinter

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.position_tables import reads_table
from kvmix_compile.passes.graph.source_lines import line_of_guard, line_of_node
from kvmix_compile.passes.graph.vocabulary import operation
from kvmix_compile.passes.match.sites import module_path

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)

# Numbers of rows that an assumption about sizes is tried with, and of tokens: all of the small ones, and then every
# power of this ratio.
ROWS = (1, 2, 3, 4, 7, 8, 32, 1000)
FIRST_TOKENS = 130
RATIO = 1.1
# No context is longer, where the model does not say how long its own is.
LONGEST = 2**21


@dataclass(frozen=True)
class Assumption:
    """What export took for granted of the sizes, because it holds for those of its example.

    text: as Python writes it. where: the line of the model's code. broken: the sizes, (rows, tokens), for which it does
    not hold, the smallest first.
    """

    text: str
    where: str
    broken: tuple[tuple[int, int], ...]


def check_lengths(graph: fx.Graph, captured: Captured) -> None:
    """Raise UnsupportedModelError where the rewritten graph of a captured model makes a value of a number of rows or
    tokens.
    """
    names = names_of_sizes(captured)
    for node in graph.nodes:
        # The beginning of a table is the rows of the tokens' positions, or all of its rows are the same.
        if reads_table(node, captured.tokens):
            continue
        for size in _values_of_sizes(node):
            expression = _text(size.meta["val"].node.expr.xreplace(names))
            raise UnsupportedModelError(
                f"the model computes with the size {expression} ({operation(node)} in "
                f"{module_path(node) or 'the model'}, {line_of_node(node)}), so what it gives for a token depends on "
                "how many are passed at once, and with a KV cache these are a few: this is not supported"
            )


def _values_of_sizes(node: fx.Node) -> Iterator[fx.Node]:
    """The symbolic sizes that `node` is given for something else than the shape of its result."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or operation(node) == "arange":
        return
    given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False))
    chooses = operation(node) in ("select", "slice", "narrow")
    for argument in node.target._schema.arguments:
        is_extent = "int" in str(argument.real_type).lower() and not chooses
        if not is_extent:
            value = node.kwargs.get(argument.name, given.get(argument.name))
            yield from filter(_is_size, value if isinstance(value, list | tuple) else [value])


def _is_size(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), SYMBOLIC)


def names_of_sizes(captured: Captured) -> dict[Symbol, Symbol]:
    """What each symbol of the graph's input sizes is: the rows or the tokens of `input_ids`.

    Raises UnsupportedModelError where these hang together.
    """
    rows, tokens = Symbol("rows", integer=True, positive=True), Symbol("tokens", integer=True, positive=True)
    names = {captured.batch.node.expr: rows, captured.tokens.node.expr: tokens}
    if not all(isinstance(size, Symbol) for size in names) or len(names) < 2:
        raise UnsupportedModelError(
            f"the model's forward takes {captured.batch} rows of {captured.tokens} tokens only, and not any numbers of "
            "them"
        )
    # Positions are as many as tokens, and logits are asked for at some of the tokens, at most at all.
    for name, meanings in (("position_ids", (rows, tokens)), ("logit_positions", (tokens,))):
        for size, meaning in zip(captured.placeholder(name).meta["val"].shape, meanings, strict=True):
            names.setdefault(size.node.expr, meaning)
    return names


def broken_assumptions(captured: Captured, longest_context: int | None) -> list[Assumption]:
    """What export assumed of the sizes and does not hold for all up to `longest_context` tokens."""
    names, environment = names_of_sizes(captured), captured.tokens.node.shape_env
    found = []
    for guard in environment.guards:
        # Of two sizes that are equal the environment keeps one.
        known = {symbol: names.get(environment.replace(symbol), symbol) for symbol in guard.expr.free_symbols}
        expression = guard.expr.xreplace(known)
        if broken := tuple(_broken(expression, longest_context or captured.most_tokens or LONGEST)):
            found.append(Assumption(_text(expression), line_of_guard(guard.sloc), broken))
    return found


def _broken(expression: Basic, longest: int) -> Iterator[tuple[int, int]]:
    """The sizes for which an expression does not come out as true, smallest first."""
    if isinstance(expression, BooleanAtom):
        if not expression:
            yield (1, 1)
        return
    by_name = {symbol.name: symbol for symbol in expression.free_symbols}
    rows = ROWS if "rows" in by_name else ROWS[:1]
    tokens = _lengths(expression, longest) if "tokens" in by_name else [1]
    for some, many in sorted(((row, token) for row in rows for token in tokens), key=lambda sizes: sizes[0] * sizes[1]):
        sizes = {"rows": some, "tokens": many}
        if expression.xreplace({by_name[name]: Integer(sizes[name]) for name in by_name}) != True:  # noqa: E712
            yield some, many


def _lengths(expression: Basic, longest: int) -> list[int]:
    """Lengths on both sides of whatever an expression compares with."""
    constants = {abs(int(number)) for number in expression.atoms(Integer) if number.is_finite}
    near = {constant * factor + step for constant in constants for factor in (1, 2, 3) for step in (-1, 0, 1)}
    grown, spread = float(FIRST_TOKENS), set[int]()
    while grown < longest:
        spread.add(int(grown))
        grown *= RATIO
    return [length for length in sorted({*range(1, FIRST_TOKENS), *near, *spread, longest}) if 0 < length <= longest]


def _text(expression: Basic) -> str:
    return str(PythonPrinter({"full_prec": False}).doprint(expression))
