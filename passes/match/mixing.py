"""Mixing: what carries information from token to token besides attention, found so that errors can name it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.export import first_line
from kvmix_compile.passes.errors import CaptureError
from kvmix_compile.passes.graph.vocabulary import CUMULATIVE, TOKEN_MIXING, argument, operation, tensor_of
from kvmix_compile.passes.match.sites import module_path

MOST_NAMED = 5

# What cuts a text or moves it along, and the number that stands for its end.
MOVES = frozenset({"slice", "narrow", "select", "roll", "pad", "constant_pad_nd"})
LAST_INDEX = 2**31


def suspects(captured: Captured) -> str:
    """Why a graph cannot be given a KV cache, in half a sentence: the operations that may mix tokens, and where."""
    token_dependent = captured.dataflow.token_dependent
    found = [
        f"{operation(node)} in {module_path(node) or 'the model'}"
        for node in captured.graph.nodes
        if node in token_dependent and _may_mix_tokens(node, captured)
    ]
    if not found:
        return "something besides the attention that was matched carries information from token to token"
    listed = ", ".join(dict.fromkeys(found[:MOST_NAMED]))
    return f"it mixes tokens otherwise than by attention ({listed}), which is not supported"


@contextmanager
def running(captured: Captured) -> Iterator[None]:
    """Around a run of the captured graph: what fails there, for a length that the graph was not traced with, is said by
    a CaptureError.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CaptureError(
            f"the graph that torch.export made of {captured.name} does not run for every length: "
            f"{suspects(captured)} ({first_line(error)})"
        ) from error


def constant_reach(graph: fx.Graph, captured: Captured) -> int:
    """How many tokens a graph reaches back or forth by a constant number, at most: where it cuts or moves the text."""
    moved = [
        abs(number)
        for node in graph.nodes
        if operation(node) in MOVES and (source := tensor_of(node.args[0])) is not None
        for axis, number in _moves(node, source.dim())
        if abs(number) < LAST_INDEX and statically_known_true(source.shape[axis] == captured.tokens)
    ]
    return max(moved, default=0)


def _moves(node: fx.Node, rank: int) -> Iterator[tuple[int, int]]:
    """By how much a tensor of this rank is moved or cut, or where, along each of its axes, as far as it is constant."""
    if operation(node) in ("slice", "narrow", "select"):
        axis, numbers = argument(node, 1, "dim", 0), node.args[2:]
        yield from ((axis, number) for number in numbers if type(number) is int)  # type: ignore[misc]
    elif operation(node) == "roll":
        shifts, axes = (argument(node, index, name, ()) for index, name in ((1, "shifts"), (2, "dims")))
        yield from ((axis, shift) for shift, axis in zip(shifts, axes, strict=False) if type(shift) is int)  # type: ignore[call-overload]
    else:  # padding is listed in pairs, the last axis first
        widths: Any = argument(node, 1, "pad", ())
        yield from ((rank - 1 - index // 2, width) for index, width in enumerate(widths) if type(width) is int)


def _may_mix_tokens(node: fx.Node, captured: Captured) -> bool:
    if operation(node) not in TOKEN_MIXING:
        return False
    source = tensor_of(node.args[0]) if node.args else None
    axis = argument(node, 1, "dim")
    if operation(node) in CUMULATIVE and source is not None and isinstance(axis, int):
        # Mixtures of experts add up how many tokens each expert has.
        return statically_known_true(source.shape[axis] == captured.tokens)
    return True
