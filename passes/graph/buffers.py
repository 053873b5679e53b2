"""Buffers: what is assembled in an empty tensor piece by piece becomes a concatenation, so that a graph's edges say
what it is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx, ops
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kvmix_compile.passes.graph.vocabulary import argument, operation, tensor_of

_EMPTY = frozenset({"new_empty", "empty", "empty_like"})


def assemble_at_once(graph: fx.Graph) -> None:
    """Each empty tensor that is filled by copies to slices of it, and read when it is full, becomes a concatenation of
    what was copied. In place.
    """
    for node in list(graph.nodes):
        if operation(node) in _EMPTY and (pieces := _pieces(node)):
            last = max(piece.copy for piece in pieces)
            with graph.inserting_after(last):
                joined = graph.call_function(ops.aten.cat.default, ([piece.source for piece in pieces], pieces[0].axis))
            joined.meta = dict(node.meta)
            node.replace_all_uses_with(joined, delete_user_cb=lambda user: user > joined)  # noqa: B023
            for piece in pieces:
                graph.erase_node(piece.copy)
                graph.erase_node(piece.slice)
            graph.erase_node(node)


@dataclass(frozen=True)
class _Piece:
    """`copy` writes `source` to `slice`, which is what lies from `begin` to `end` along the axis."""

    slice: fx.Node
    copy: fx.Node
    source: fx.Node
    axis: int
    begin: int
    end: int


def _pieces(buffer: fx.Node) -> Sequence[_Piece]:
    """What a buffer is assembled of, in order, where that is all of it and nothing reads it before; else nothing."""
    value = tensor_of(buffer)
    if value is None:
        return ()
    written = [piece for user in buffer.users if (piece := _piece(user, buffer)) is not None]
    pieces = sorted(written, key=lambda piece: piece.begin)
    readers = [user for user in buffer.users if all(user is not piece.slice for piece in pieces)]
    axes = {piece.axis for piece in pieces}
    if len(axes) != 1 or any(reader < piece.copy for reader in readers for piece in pieces):
        return ()
    size = value.shape[axes.pop()]
    fits = pieces[0].begin == 0 and statically_known_true(pieces[-1].end == size)
    return pieces if fits and all(one.end == other.begin for one, other in pairwise(pieces)) else ()


def _piece(user: fx.Node, buffer: fx.Node) -> _Piece | None:
    """The write that a use of the buffer is part of, if it is."""
    written, whole = tensor_of(user), tensor_of(buffer)
    if operation(user) != "slice" or user.args[0] is not buffer or len(user.users) != 1 or written is None:
        return None
    copy = next(iter(user.users))
    source = copy.args[1] if operation(copy) == "copy_" and copy.args[0] is user and not copy.users else None
    copied = tensor_of(source)
    axis, begin, step = (argument(user, index, name, default) for index, name, default in _OF_SLICE)
    if copied is None or whole is None or not isinstance(axis, int) or type(begin) is not int or step != 1:
        return None
    axis %= whole.dim()
    same = copied.dtype == written.dtype and len(copied.shape) == len(written.shape)
    if not same or not all(
        map(statically_known_true, (a == b for a, b in zip(copied.shape, written.shape, strict=True)))
    ):
        return None
    extent = written.shape[axis]
    assert isinstance(source, fx.Node)
    return _Piece(user, copy, source, axis, begin, begin + extent) if isinstance(extent, int) and begin >= 0 else None


_OF_SLICE = ((1, "dim", 0), (2, "start", 0), (4, "step", 1))
