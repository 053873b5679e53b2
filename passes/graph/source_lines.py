"""Source lines: where in the model's code something comes from, for errors that name it."""

from traceback import FrameSummary
from typing import Any

import torch
from torch import fx


def line_of_node(node: fx.Node) -> str:
    """The line that a node was traced at, an empty string where it is not known."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    files = [line for line in trace if line.startswith("File ")]
    return files[-1].removeprefix("File ") if files else ""


def line_of_guard(location: Any) -> str:
    """The line at which something was assumed of a size: `sloc` of one of ShapeEnv's guards."""
    frame = location.framework_loc
    if not isinstance(frame, FrameSummary):
        return str(location)
    return f'"{frame.filename}", line {frame.lineno}, in {frame.name}'


def line_of_bound(size: torch.SymInt) -> str:
    """The line at which a symbolic size was assumed to be no larger than it may be."""
    bounds = size.node.shape_env.var_to_range_sloc.get(size.node.expr)
    return line_of_guard(bounds.upper) if bounds is not None else "a place that is not known"
