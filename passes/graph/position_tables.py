"""Position tables: what was computed for every position beforehand, and is read from its beginning."""

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kvmix_compile.passes.graph.vocabulary import argument, operation


def reads_table(node: fx.Node, tokens: object) -> bool:
    """`table[:tokens]`: the first rows of what was computed for every position beforehand."""
    end = argument(node, 3, "end")
    return (
        operation(node) == "slice"
        and argument(node, 2, "start") in (None, 0)
        and isinstance(end, fx.Node)
        and statically_known_true(end.meta["val"] == tokens)
    )
