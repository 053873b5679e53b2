"""Evaluate: run a slice of a graph on probe values, to see what it does rather than how it is spelled."""

from collections.abc import Mapping
from typing import Any

from torch import fx

from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.vocabulary import operation


def evaluate(module: fx.GraphModule, target: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """The value of `target` when the nodes in `known` have the values given there.

    Only what `target` needs and `known` does not cut off is run. Raises KeyError for a placeholder that is needed and
    not known, UnsupportedModelError where an operation does not take the values that it is given.
    """
    values = dict(known)
    interpreter = fx.Interpreter(module)
    pending = [target]
    while pending:
        node = pending[-1]
        missing = [source for source in node.all_input_nodes if source not in values]
        if node in values:
            pending.pop()
        elif missing:
            pending.extend(missing)
        elif node.op == "placeholder":
            raise KeyError(node.name)
        else:
            interpreter.env = values
            try:
                values[node] = interpreter.run_node(node)
            except RuntimeError as error:
                reason = f"{operation(node)}: {str(error).splitlines()[0]}"
                raise UnsupportedModelError(
                    f"what it does to its attention scores, keys or values cannot be tried on a probe ({reason})"
                ) from error
            pending.pop()
    return values[target]
