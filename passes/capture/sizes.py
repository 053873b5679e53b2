"""Sizes: what a symbolic size of a graph is, read off the values that the graph is called with."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sympy import Integer, Symbol
from torch import Tensor

from kvmix_compile.passes.capture.dynamo import Lowered
from kvmix_compile.passes.errors import UnsupportedModelError

Size = Callable[[Sequence[Any]], int]


def size_hint(size: Any) -> int:
    """The size that Dynamo traces with; unlike `int`, asking does not fix it."""
    return size.node.hint if isinstance(size, torch.SymInt) else int(size)


def size_reader(size: Any, lowered: Lowered) -> Size:
    """A function from the inputs of a lowered graph to what `size` is with them."""
    if not isinstance(size, torch.SymInt):
        return lambda inputs: int(size)
    expression = size.node.expr
    symbols = {symbol: _symbol_reader(symbol, lowered) for symbol in expression.free_symbols}
    if expression in symbols:
        return symbols[expression]
    return lambda inputs: int(expression.xreplace({symbol: Integer(read(inputs)) for symbol, read in symbols.items()}))


def _symbol_reader(symbol: Symbol, lowered: Lowered) -> Size:
    for index, fake in enumerate(lowered.fakes):
        if _is(fake, symbol):
            return _input(index)
        for axis, extent in enumerate(fake.shape if isinstance(fake, Tensor) else ()):
            if _is(extent, symbol):
                return _extent(index, axis)
    raise UnsupportedModelError(
        f"a size of its cache, {symbol}, is none of the sizes of its inputs: compile with dynamic=False"
    )


def _is(size: Any, symbol: Symbol) -> bool:
    return isinstance(size, torch.SymInt) and size.node.expr == symbol


def _input(index: int) -> Size:
    return lambda inputs: int(inputs[index])


def _extent(index: int, axis: int) -> Size:
    return lambda inputs: int(inputs[index].shape[axis])
