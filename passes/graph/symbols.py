"""Symbols: a size that a graph is traced with and that stands for any other."""

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext


def symbolic_size(mode: FakeTensorMode, name: str, traced: int) -> torch.SymInt:
    """A new symbol of the mode's shape environment. `traced`: the number that it has while a graph is traced; different
    symbols need different ones, as equal sizes are taken for the same.
    """
    free = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])  # type: ignore[var-annotated]
    (size,) = mode.from_tensor(torch.empty(traced), symbolic_context=free, source=ConstantSource(f"kvmix_{name}")).shape
    assert isinstance(size, torch.SymInt)
    return size
