"""The memory of a launch, and who touched which byte when.

Threads of different warps are in order only where a barrier of their program lies between them, and those of different
programs never. An epoch is how many barriers a program has passed.
"""

from collections.abc import Sequence

import numpy

from tests.ptx.numbers import UNSIGNED, Array
from tests.ptx.syntax import PtxError

NOBODY, SEVERAL = -1, -2


class Shadow:
    """Of each byte the warp that wrote it last and the warps that read it last, with their epochs; and, where programs
    share it, the programs that ever read it.
    """

    def __init__(self, size: int, warps: int, what: str, between_programs: bool) -> None:
        self.warps, self.what, self.between_programs = warps, what, between_programs
        self.writer, self.written, self.reader, self.read = numpy.full((4, size), NOBODY, numpy.int32)
        self.programs = numpy.full(size if between_programs else 0, NOBODY, numpy.int32)

    def reads(self, at: Array, warp: Array, epoch: Array) -> None:
        """at: byte offsets [accesses, bytes]; warp, epoch: [accesses]. Raises PtxError for what is not in order."""
        at, warp, epoch = _by_byte(at, warp, epoch)
        writer = self.writer[at]
        if not self.between_programs and (writer == NOBODY).any():
            raise PtxError(f"{self.what}: {(writer == NOBODY).sum()} bytes are read that nobody wrote")
        self._in_order(writer, self.written[at], warp, epoch, "read that another warp wrote")
        _note(self.reader, at, numpy.where(self.read[at] == epoch, self.reader[at], NOBODY), warp)
        self.read[at] = epoch
        if self.between_programs:
            _note(self.programs, at, self.programs[at], warp // self.warps)

    def writes(self, at: Array, warp: Array, epoch: Array) -> None:
        """As reads."""
        at, warp, epoch = _by_byte(at, warp, epoch)
        self._in_order(self.writer[at], self.written[at], warp, epoch, "written that another warp wrote")
        self._in_order(self.reader[at], self.read[at], warp, epoch, "written that another warp read")
        if self.between_programs:
            programs = self.programs[at]
            if ((programs != NOBODY) & (programs != warp // self.warps)).any():
                raise PtxError(f"{self.what}: bytes are written that another program read")
        self.writer[at], self.written[at] = warp, epoch

    def _in_order(self, who: Array, when: Array, warp: Array, epoch: Array, what: str) -> None:
        other = (who != NOBODY) & (who != warp)
        same_program = (who == SEVERAL) | (who // self.warps == warp // self.warps)
        race = other & numpy.where(same_program, when == epoch, self.between_programs)
        if race.any():
            raise PtxError(f"{self.what}: {race.sum()} bytes are {what}, with no barrier between")


def _note(readers: Array, at: Array, before: Array, who: Array) -> None:
    """One more reader of each place, which may be several of one place."""
    now = numpy.where((before == NOBODY) | (before == who), who, SEVERAL)
    readers[at] = now
    readers[at[readers[at] != now]] = SEVERAL


def _by_byte(at: Array, warp: Array, epoch: Array) -> tuple[Array, Array, Array]:
    return at.ravel(), numpy.repeat(warp, at.shape[1]), numpy.repeat(epoch, at.shape[1])


class Memory:
    """Bytes, and their shadow."""

    def __init__(self, cells: Array, shadow: Shadow) -> None:
        self.cells, self.shadow, self.what = cells, shadow, shadow.what
        self.views = {size: cells.view(UNSIGNED[size]) for size in (1, 2, 4, 8)}

    def load(self, at: Array, size: int, count: int, warp: Array, epoch: Array) -> list[Array]:
        """`count` neighbouring elements of `size` bytes from each offset."""
        self.shadow.reads(spread(at, size * count), warp, epoch)
        return [self.views[size][at // size + place] for place in range(count)]

    def store(self, at: Array, size: int, values: Sequence[Array], warp: Array, epoch: Array) -> None:
        """Several threads may store the same value to one place, as layouts do that repeat elements, and no other."""
        self.shadow.writes(spread(at, size * len(values)), warp, epoch)
        for place, value in enumerate(values):
            self.views[size][at // size + place] = value
            if (self.views[size][at // size + place] != value).any():
                raise PtxError(f"{self.what}: one instruction stores different values to one place")


class GlobalMemory(Memory):
    """What a launch may touch: the memory of its tensors, copied, each with a gap around it."""

    def __init__(self, spans: Sequence[tuple[int, Array]], warps: int) -> None:
        """spans: address and bytes of each tensor."""
        self.spans = _apart(spans)
        self.starts = numpy.array([address for address, _ in self.spans], numpy.uint64)
        self.ends = numpy.array([address + len(cells) for address, cells in self.spans], numpy.uint64)
        offsets, end = [], 0
        for address, cells in self.spans:
            # As aligned as it was.
            offsets.append(end + 64 + (address - end) % 64)
            end = offsets[-1] + len(cells)
        self.offsets = numpy.array(offsets, numpy.int64)
        cells = numpy.zeros((end // 64 + 2) * 64, numpy.uint8)
        super().__init__(cells, Shadow(len(cells), warps, "global memory", between_programs=True))
        for offset, (_, own) in zip(offsets, self.spans, strict=True):
            self.cells[offset : offset + len(own)] = own

    def offsets_of(self, addresses: Array, size: int) -> Array:
        """Raises PtxError for an access that is not within one tensor, or not aligned."""
        span = numpy.searchsorted(self.starts, addresses, "right").astype(numpy.int64) - 1
        outside = (span < 0) | (addresses + numpy.uint64(size) > self.ends[span])
        if outside.any():
            raise PtxError(f"{self.what}: {outside.sum()} threads access {size} bytes outside of all tensors")
        _check_aligned(addresses, size, self.what)
        return (addresses - self.starts[span]).astype(numpy.int64) + self.offsets[span]

    def write_back(self) -> None:
        for offset, (_, own) in zip(self.offsets, self.spans, strict=True):
            own[:] = self.cells[offset : offset + len(own)]


def _apart(spans: Sequence[tuple[int, Array]]) -> list[tuple[int, Array]]:
    """In order, without those within others."""
    apart = list[tuple[int, Array]]()
    for address, cells in sorted(spans, key=lambda span: (span[0], -len(span[1]))):
        if apart and address < (end := apart[-1][0] + len(apart[-1][1])):
            if address + len(cells) > end:
                raise PtxError("two tensors of a launch overlap in part")
        else:
            apart.append((address, cells))
    return apart


class SharedMemory(Memory):
    """Of several programs, one behind the other.

    Copies that go on in the background (cp.async) arrive when they are waited for: until then nobody may touch where
    they go. What ordinary stores wrote tensor cores may read behind a fence alone (PTX ISA, "Async proxy").
    """

    def __init__(self, programs: int, size: int, warps: int) -> None:
        self.size, self.stride = size, max(128, -(-size // 128) * 128)
        cells = numpy.full(programs * self.stride, 0xA5, numpy.uint8)
        super().__init__(cells, Shadow(len(cells), warps, "shared memory", between_programs=False))
        self.arriving, self.unfenced = numpy.zeros((2, len(cells)), numpy.bool_)

    def offsets_of(self, addresses: Array, size: int, program: Array) -> Array:
        """Raises PtxError for an access beyond what a program has, or not aligned."""
        addresses = addresses.astype(numpy.int64)
        if (addresses + size > self.size).any():
            raise PtxError(f"{self.what}: {size} bytes at {addresses.max()} are beyond its {self.size}")
        _check_aligned(addresses, size, self.what)
        return addresses + program * self.stride

    def load(self, at: Array, size: int, count: int, warp: Array, epoch: Array) -> list[Array]:
        self._check_arrived(spread(at, size * count))
        return super().load(at, size, count, warp, epoch)

    def store(self, at: Array, size: int, values: Sequence[Array], warp: Array, epoch: Array) -> None:
        self._check_arrived(spread(at, size * len(values)))
        super().store(at, size, values, warp, epoch)
        self.unfenced[spread(at, size * len(values))] = True

    def begin_copy(self, at: Array, size: int, warp: Array, epoch: Array) -> None:
        self._check_arrived(spread(at, size))
        self.shadow.writes(spread(at, size), warp, epoch)
        self.arriving[spread(at, size)] = True

    def end_copy(self, at: Array, values: Array, warp: Array, epoch: Array) -> None:
        """values: uint8 [copies, bytes]. They count as written now."""
        places = spread(at, values.shape[1])
        self.cells[places], self.arriving[places], self.unfenced[places] = values, False, True
        self.shadow.writer[places], self.shadow.written[places] = warp[:, None], epoch[:, None]

    def fence(self, warps: Array) -> None:
        """What these warps wrote tensor cores may read."""
        self.unfenced &= ~numpy.isin(self.shadow.writer, warps)

    def read_by_tensor_cores(self, at: Array, warp: Array, epoch: Array) -> Array:
        """16-bit elements at each offset, [accesses]."""
        places = spread(at, 2)
        self._check_arrived(places)
        if self.unfenced[places].any():
            raise PtxError(f"{self.what}: tensor cores read what was stored with no fence between")
        self.shadow.reads(places, warp, epoch)
        return self.views[2][at // 2]

    def _check_arrived(self, places: Array) -> None:
        if self.arriving[places].any():
            raise PtxError(f"{self.what}: an access to where a copy may still be arriving")


def spread(at: Array, size: int) -> Array:
    """The offsets of `size` bytes from each offset: [accesses, size]."""
    return at[:, None] + numpy.arange(size)


def _check_aligned(addresses: Array, size: int, what: str) -> None:
    if (addresses % addresses.dtype.type(size)).any():
        raise PtxError(f"{what}: an access of {size} bytes that is not aligned to them")
