"""What the threads of a warp, or of four, do together: shuffles, and matrices (PTX ISA, "Warp Level Matrix
Instructions" and "Asynchronous Warpgroup Level Matrix Instructions").

Sums of products are in float64: what tensor cores round inside is not defined.
"""

from collections.abc import Sequence

import numpy

from tests.ptx.machine import WARP, Machine, Mask
from tests.ptx.numbers import KINDS, Array
from tests.ptx.syntax import PtxError

# Rows and columns of the matrices that a warp loads, and rows of those that a warp multiplies.
SMALL, DEPTH = 8, 16
WARP_GROUP = 4 * WARP

LANES = numpy.arange(WARP, dtype=numpy.int64)


def shuffle(machine: Machine, how: str, values: Array, lane: Array, limits: Array, mask: Mask) -> Array:
    """Each thread has the value of another one in its warp."""
    machine.check_whole_warps(mask)
    values, lane, limits = (machine.everywhere(x).reshape(-1, WARP) for x in (values, lane, limits))
    lane, limits = (lane & numpy.uint32(WARP - 1)).astype(numpy.int64), limits.astype(numpy.int64)
    segment, end = limits >> 8 & WARP - 1, limits & WARP - 1
    first = LANES & segment
    last = first | end & ~segment
    source = {"bfly": LANES ^ lane, "idx": first | lane & ~segment, "down": LANES + lane, "up": LANES - lane}[how]
    valid = source >= last if how == "up" else source <= last
    return numpy.take_along_axis(values, numpy.where(valid, source, LANES), 1).reshape(-1)


def load_matrices(machine: Machine, addresses: Array, count: int, transposed: bool, mask: Mask) -> list[Array]:
    """ldmatrix: of each matrix a register, two neighbours of a row for each thread."""
    warps, at = _rows(machine, addresses, count, mask)
    words = machine.shared.load(at.ravel(), 4, SMALL // 2, *_who(machine, warps, SMALL * count))
    matrices = numpy.stack(words, -1).view(numpy.uint16).reshape(len(warps), count, SMALL, SMALL)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    registers = numpy.zeros((count, len(machine.block) // WARP, WARP), numpy.uint32)
    registers[:, warps] = numpy.ascontiguousarray(matrices).view(numpy.uint32).reshape(-1, count, WARP).swapaxes(0, 1)
    return list(registers.reshape(count, -1))


def store_matrices(machine: Machine, addresses: Array, values: Sequence[Array], transposed: bool, mask: Mask) -> None:
    """stmatrix: load_matrices the other way."""
    warps, at = _rows(machine, addresses, len(values), mask)
    registers = numpy.stack([machine.everywhere(value).reshape(-1, WARP)[warps] for value in values], 1)
    matrices = registers.view(numpy.uint16).reshape(len(warps), len(values), SMALL, SMALL)
    if transposed:
        matrices = numpy.ascontiguousarray(matrices.swapaxes(2, 3))
    words = matrices.view(numpy.uint32).reshape(-1, SMALL // 2)
    machine.shared.store(at.ravel(), 4, list(words.T), *_who(machine, warps, SMALL * len(values)))


def _rows(machine: Machine, addresses: Array, count: int, mask: Mask) -> tuple[Array, Array]:
    """The warps that are here, and where each row of theirs is: the first threads know that. [warps, 8 * count]"""
    machine.check_whole_warps(mask)
    warps = numpy.unique(machine.threads(mask) // WARP)
    rows = machine.everywhere(addresses).reshape(-1, WARP)[warps, : SMALL * count]
    return warps, machine.shared.offsets_of(rows, 2 * SMALL, (warps // machine.warps)[:, None])


def _who(machine: Machine, warps: Array, accesses: int) -> tuple[Array, Array]:
    return numpy.repeat(warps, accesses), numpy.repeat(machine.epochs[warps // machine.warps], accesses)


def multiply(
    machine: Machine, kind: str, a: Sequence[Array], b: Sequence[Array], c: Sequence[Array], mask: Mask
) -> list[Array]:
    """mma.m16n8k16: a @ b + c of each warp, in registers."""
    machine.check_whole_warps(mask)
    left = _fragment(machine, a, kind)
    # Its columns are the threads' groups, its rows their places in them.
    right = numpy.concatenate([_pairs(machine, x, kind).swapaxes(1, 2) for x in b], 1)
    # Register 2 h + l: row 8 h + group, column 2 thread + l.
    sums = numpy.stack([machine.everywhere(x).view(numpy.float32) for x in c]).reshape(2, 2, -1, SMALL, 4)
    sums = sums.transpose(2, 0, 3, 4, 1).reshape(-1, DEPTH, SMALL)
    product = (left @ right + sums).astype(numpy.float32)
    registers = product.reshape(-1, 2, SMALL, 4, 2).transpose(1, 4, 0, 2, 3)
    return list(numpy.ascontiguousarray(registers).view(numpy.uint32).reshape(4, -1))


def _pairs(machine: Machine, register: Array, kind: str) -> Array:
    """A matrix of each warp, [warps, 8, 8]: two neighbours of a row in each thread."""
    halves = numpy.ascontiguousarray(machine.everywhere(register)).view(numpy.uint16)
    return KINDS[kind].numbers(halves).astype(numpy.float64).reshape(-1, SMALL, SMALL)


def _fragment(machine: Machine, registers: Sequence[Array], kind: str) -> Array:
    """The left operand, [warps, 16, 16]: upper left, lower left, upper right, lower right."""
    quarters = [_pairs(machine, register, kind) for register in registers]
    return numpy.concatenate([numpy.concatenate(quarters[:2], 1), numpy.concatenate(quarters[2:], 1)], 2)


def multiply_in_groups(
    machine: Machine,
    shape: str,
    kind: str,
    sums: Sequence[Array],
    left: Sequence[Array] | Array,
    right: Array,
    accumulate: Array,
    transposed: tuple[bool, bool],
    mask: Mask,
) -> list[Array]:
    """wgmma.m64nNk16: of four warps, sums + left @ right. right, and left unless in registers, are descriptors."""
    machine.check_whole_warps(mask)
    columns = int(shape.split("n")[1].split("k")[0])
    groups = numpy.unique(machine.threads(mask) // WARP_GROUP)
    if len(machine.threads(mask)) != len(groups) * WARP_GROUP:
        raise PtxError("only a part of a warp group is here")
    b = KINDS[kind].numbers(_tile(machine, right, columns, transposed[1], groups))
    if isinstance(left, list):
        a = _fragment(machine, left, kind).reshape(-1, 64, DEPTH)[groups]
    else:
        a = KINDS[kind].numbers(_tile(machine, left, 64, transposed[0], groups))  # type: ignore[arg-type]
    product = a.astype(numpy.float64) @ b.astype(numpy.float64).swapaxes(1, 2)
    # Register 4 j + 2 h + l: row 16 warp + 8 h + group, column 8 j + 2 thread + l.
    before = numpy.stack([machine.everywhere(x).view(numpy.float32) for x in sums])
    before = before.reshape(columns // 8, 2, 2, -1, 4, SMALL, 4).transpose(3, 4, 1, 5, 0, 6, 2).reshape(-1, 64, columns)
    kept = machine.everywhere(accumulate).reshape(-1, WARP_GROUP)[:, :1, None]
    after = numpy.where(kept, before, 0).astype(numpy.float64)
    after[groups] += product
    registers = after.astype(numpy.float32).reshape(-1, 4, 2, SMALL, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
    return list(numpy.ascontiguousarray(registers).view(numpy.uint32).reshape(columns // 2, -1))


def _tile(machine: Machine, descriptor: Array, rows: int, transposed: bool, groups: Array) -> Array:
    """The 16-bit elements of an operand in shared memory, as its descriptor says: [groups, rows, 16].

    The descriptor has start, leading and stride byte offset in units of 16 bytes, and how rows are swizzled.
    """
    each = machine.everywhere(descriptor).reshape(-1, WARP_GROUP)
    if (each != each[:, :1]).any():
        raise PtxError("a descriptor is not the same within a warp group")
    found = [int(descriptor) for descriptor in each[groups, 0]]
    swizzled = {1: 128, 2: 64, 3: 32}.get(found[0] >> 62)
    if swizzled is None or any(descriptor >> 49 & 7 for descriptor in found):
        raise PtxError("a descriptor without swizzle, or with an offset of its base, is not known here")
    start, leading, stride = (
        numpy.array([(descriptor >> low & 0x3FFF) << 4 for descriptor in found])[:, None, None] for low in (0, 16, 32)
    )
    row, column = numpy.arange(rows)[None, :, None], numpy.arange(DEPTH)[None, None, :]
    if transposed:
        across = swizzled // 2
        at = start + row // across * leading + column // 8 * stride + column % 8 * swizzled + row % across * 2
    else:
        at = start + row // 8 * stride + row % 8 * swizzled + column * 2
    at ^= (at >> 7 & swizzled // 16 - 1) << 4
    # Any of the four warps may read it: to those who wrote it the first one stands for all.
    warps = groups * 4
    at = machine.shared.offsets_of(at, 2, (warps // machine.warps)[:, None, None])
    elements = machine.shared.read_by_tensor_cores(at.ravel(), *_who(machine, warps, rows * DEPTH))
    return elements.reshape(at.shape)
