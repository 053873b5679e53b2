"""The structures of interface.h, declared for ctypes, which passes them by address.

Nothing else would notice if the two differed: a library would read one member in the place of another. So it says where
its own members lie, and check compares.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import c_char_p, c_double, c_int64, c_void_p
from itertools import zip_longest

import torch

from kvmix_compile.kernels.format.precision import TIERS

# ElementType.
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Name, offset and size, in bytes, of a structure or of a member of one.
Extent = tuple[str, int, int]


class InterfaceError(Exception):
    """A library was compiled from other structures than those declared here."""


class Part(ctypes.Structure):
    """Channels that are stored with so many bits, and how their scales and zero points of 4 bits are rounded."""

    _fields_ = (
        ("channels", c_int64),
        ("bits", c_int64),
        ("margin", c_double),
        ("zero_point_bias", c_double),
        ("log2_scale_bias", c_double),
    )


class BlockFormat(ctypes.Structure):
    """How a packed block of keys or of values is stored."""

    _fields_ = (
        ("bits", c_int64),
        ("group", c_int64),
        ("scale_bits", c_int64),
        ("block_bytes", c_int64),
        ("part_count", c_int64),
        ("parts", Part * TIERS),
    )


class Strides(ctypes.Structure):
    """From page to page of a pool, from head to head and from token or block to the next, in bytes."""

    _fields_ = (("page", c_int64), ("head", c_int64), ("place", c_int64))


class Side(ctypes.Structure):
    """The keys or the values: a chunk with its strides, in elements, and the tensors of the state or pools of pages."""

    _fields_ = (
        ("chunk", c_void_p),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("dim", c_int64),
        ("sink", c_void_p),
        ("packed", c_void_p),
        ("ring", c_void_p),
        ("raw_strides", Strides),
        ("packed_strides", Strides),
    )


class Table(ctypes.Structure):
    """In which pages the tokens or blocks of rows lie."""

    _fields_ = (
        ("pages", c_void_p),
        ("stride", c_int64),
        ("width", c_int64),
        ("size", c_int64),
        ("count", c_int64),
    )


class Shape(ctypes.Structure):
    """What keys and values have in common."""

    _fields_ = (
        ("lengths", c_void_p),
        ("starts", c_void_p),
        ("element", c_int64),
        ("rows", c_int64),
        ("heads", c_int64),
        ("tokens", c_int64),
        ("sinks", c_int64),
        ("capacity", c_int64),
        ("slots", c_int64),
        ("recent", c_int64),
        ("raw", Table),
        ("packed", Table),
    )


class Threads(ctypes.Structure):
    """On how many threads, and what starts them."""

    _fields_ = (("count", c_int64), ("parallel", c_void_p))


class Attention(ctypes.Structure):
    """The queries, what becomes of them, and how scores are weighted."""

    _fields_ = (
        ("query", c_void_p),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("shared", c_int64),
        ("values_are_keys", c_int64),
        ("output", c_void_p),
        ("scale", c_double),
        ("softcap", c_double),
        ("sliding_window", c_int64),
        ("attention_chunk", c_int64),
        ("sink_logits", c_void_p),
        ("slopes", c_void_p),
    )


STRUCTURES = (Part, BlockFormat, Strides, Side, Table, Shape, Threads, Attention)


class _Extent(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("offset", c_int64), ("size", c_int64))


def check(library: ctypes.CDLL) -> None:
    """Raises InterfaceError, naming the first difference, where a library has other structures than these."""
    for found, declared in zip_longest(_extents_of(library), declared_extents()):
        if found != declared:
            raise InterfaceError(
                f"the CPU's library has {_described(found)} where interface.py declares {_described(declared)}"
            )


def declared_extents() -> Iterator[Extent]:
    """Of each structure declared here and then of its members, in order."""
    for structure in STRUCTURES:
        yield structure.__name__, 0, ctypes.sizeof(structure)
        for name, *_ in structure._fields_:
            member = getattr(structure, name)
            yield f"{structure.__name__}.{name}", member.offset, member.size


def _extents_of(library: ctypes.CDLL) -> Iterator[Extent]:
    function = library.kvmix_extents
    function.argtypes, function.restype = [], ctypes.POINTER(_Extent)
    # The list ends with one that has no name.
    for extent in function():
        if extent.name is None:
            return
        yield extent.name.decode(), extent.offset, extent.size


def _described(extent: Extent | None) -> str:
    if extent is None:
        return "nothing"
    name, offset, size = extent
    return f"{name} with {size} bytes from byte {offset} on"
