"""Runs a kernel: all threads of several programs at once, each register an array of them.

Of all blocks that threads have come to, the first one in the text is carried out, by those that are there: so what
parted meets again.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy

from tests.ptx.memory import GlobalMemory, SharedMemory
from tests.ptx.numbers import UNSIGNED, Array
from tests.ptx.syntax import Instruction, Kernel, PtxError

WARP = 32

# Of which threads; None: of all of them.
Mask: TypeAlias = Array | None
Step: TypeAlias = Callable[["Machine", Mask], None]

# What a register holds that nothing was written to: no number, wherever it is a float.
UNWRITTEN = {0: 0, 1: 0x55, 2: 0x7E55, 4: 0x7FC0DEAD, 8: 0x7FF8DEADDEADBEEF}


class Machine:
    """`programs` of a grid. An array of one element: every thread has it."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        parameters: dict[str, Array],
        grid: tuple[int, int, int],
        programs: Sequence[int],
        shared_bytes: int,
    ) -> None:
        self.kernel, self.memory, self.parameters = kernel, memory, parameters
        count, threads = len(programs), kernel.threads
        self.warps = threads // WARP
        self.shared = SharedMemory(count, shared_bytes, self.warps)
        self.program = numpy.repeat(numpy.arange(count), threads)
        thread = numpy.tile(numpy.arange(threads), count)
        self.warp = (self.program * self.warps + thread // WARP).astype(numpy.int32)
        # Of the whole launch.
        self.warp_in_grid = (numpy.repeat(programs, threads) * self.warps + thread // WARP).astype(numpy.int32)
        self.registers = {name: numpy.array([UNWRITTEN[s]], UNSIGNED[s]) for name, s in kernel.registers.items()}
        self.special = _special(thread, threads, grid, numpy.repeat(numpy.asarray(programs), threads))
        self.all_threads = numpy.arange(count * threads)
        self.block = numpy.zeros(count * threads, numpy.int32)
        self.waits_at = numpy.full(count * threads, -1, numpy.int32)
        self.ended = numpy.zeros(count * threads, numpy.bool_)
        self.epochs = numpy.zeros(count, numpy.int32)
        # Copies in the background, and how many groups of them each thread has closed.
        self.copies: list[Copies] = []
        self.groups = numpy.zeros(count * threads, numpy.int64)

    def run(self, step: Callable[[Instruction], Step]) -> None:
        """Raises PtxError, which names the instruction, for whatever a kernel must not do."""
        with numpy.errstate(all="ignore"):
            while not self.ended.all():
                # Never nobody: when a program's last thread comes to a barrier or to its end, those that wait go on.
                ready = ~self.ended & (self.waits_at < 0)
                here = self.block[ready].min()
                mask = ready & (self.block == here)
                self._run_block(int(here), None if mask.all() else mask, step)

    def _run_block(self, number: int, mask: Mask, step: Callable[[Instruction], Step]) -> None:
        self.go_to(number + 1, mask)
        for instruction in self.kernel.blocks[number]:
            try:
                step(instruction)(self, mask)
            except PtxError as error:
                raise PtxError(f"{error}\n  in: {instruction.text}\n  from: {instruction.place}") from None

    # Registers

    def everywhere(self, values: Array) -> Array:
        """A value for each thread."""
        return values if len(values) == len(self.block) else numpy.broadcast_to(values, self.block.shape)

    def write(self, register: str, bits: Array, mask: Mask) -> None:
        self.registers[register] = bits if mask is None else numpy.where(mask, bits, self.registers[register])

    # Control

    def go_to(self, block: int, mask: Mask) -> None:
        self.block[self.threads(mask)] = block

    def end(self, mask: Mask) -> None:
        self.ended[self.threads(mask)] = True
        self._release()

    def wait_for_all(self, mask: Mask) -> None:
        """A barrier of a program."""
        self.check_whole_warps(mask)
        threads = self.threads(mask)
        self.waits_at[threads] = self.block[threads]
        self._release()

    def _release(self) -> None:
        """Programs of which every thread waits or has ended go on."""
        waits_at = self.waits_at.reshape(len(self.epochs), -1)
        waiting = waits_at >= 0
        complete = (waiting | self.ended.reshape(waiting.shape)).all(1) & waiting.any(1)
        for program in numpy.flatnonzero(complete):
            if len(numpy.unique(waits_at[program][waiting[program]])) > 1:
                raise PtxError("threads of one program wait at different barriers")
        self.epochs += complete
        waits_at[complete] = -1

    def check_whole_warps(self, mask: Mask) -> None:
        """Raises PtxError where a part of a warp carries out what only all of it may."""
        if mask is None:
            return
        here, left = mask.reshape(-1, WARP), ~self.ended.reshape(-1, WARP)
        if (here.any(1) & ~(here | ~left).all(1)).any():
            raise PtxError("only a part of a warp is here")

    # Memory

    def threads(self, mask: Mask) -> Array:
        return self.all_threads if mask is None else numpy.flatnonzero(mask)

    def load(self, shared: bool, addresses: Array, size: int, count: int, mask: Mask) -> list[Array]:
        """`count` neighbouring elements of `size` bytes."""
        threads = self.threads(mask)
        memory, at = self._place(shared, addresses, size * count, threads)
        found = memory.load(at, size, count, *self.who(shared, threads))
        return found if mask is None else [self.scattered(values, threads) for values in found]

    def store(self, shared: bool, addresses: Array, size: int, values: Sequence[Array], mask: Mask) -> None:
        threads = self.threads(mask)
        memory, at = self._place(shared, addresses, size * len(values), threads)
        memory.store(at, size, [self.everywhere(value)[threads] for value in values], *self.who(shared, threads))

    def _place(
        self, shared: bool, addresses: Array, size: int, threads: Array
    ) -> tuple[GlobalMemory | SharedMemory, Array]:
        addresses = self.everywhere(addresses)[threads]
        if shared:
            return self.shared, self.shared.offsets_of(addresses, size, self.program[threads])
        return self.memory, self.memory.offsets_of(addresses, size)

    def who(self, shared: bool, threads: Array) -> tuple[Array, Array]:
        """The warps of threads, and the epochs that they are in."""
        return (self.warp if shared else self.warp_in_grid)[threads], self.epochs[self.program[threads]]

    def scattered(self, values: Array, threads: Array) -> Array:
        full = numpy.zeros(self.block.shape, values.dtype)
        full[threads] = values
        return full

    def copy(self, to: Array, source: Array, size: int, bytes_read: Array, mask: Mask) -> None:
        """In the background, from global to shared memory. What is not read is zero."""
        threads = self.threads(mask)
        bytes_read = self.everywhere(bytes_read)[threads]
        if ((bytes_read != 0) & (bytes_read != size)).any():
            raise PtxError("a copy of a part of its bytes is not known here")
        _, at = self._place(True, to, size, threads)
        cells, reading = numpy.zeros((len(threads), size), numpy.uint8), bytes_read > 0
        if reading.any():
            memory, begin = self._place(False, source, size, threads[reading])
            words = memory.load(begin, 4, size // 4, *self.who(False, threads[reading]))
            cells[reading] = numpy.stack(words, 1).view(numpy.uint8)
        self.shared.begin_copy(at, size, *self.who(True, threads))
        self.copies.append(Copies(threads, at, cells, self.groups[threads]))

    def close_group(self, mask: Mask) -> None:
        self.groups[self.threads(mask)] += 1

    def wait_for_copies(self, left: int, mask: Mask) -> None:
        """Until of each thread's groups of copies the last `left` may be under way."""
        waiting = numpy.ones(self.block.shape, numpy.bool_) if mask is None else mask
        for copies in self.copies:
            arrived = waiting[copies.threads] & (copies.group < self.groups[copies.threads] - left)
            threads = copies.threads[arrived]
            self.shared.end_copy(copies.at[arrived], copies.cells[arrived], *self.who(True, threads))
            copies.keep(~arrived)
        self.copies = [copies for copies in self.copies if len(copies.threads)]


class Copies:
    """Under way: of which threads, to which offsets, which bytes, and in which of each thread's groups."""

    def __init__(self, threads: Array, at: Array, cells: Array, group: Array) -> None:
        self.threads, self.at, self.cells, self.group = threads, at, cells, group

    def keep(self, these: Array) -> None:
        self.__init__(self.threads[these], self.at[these], self.cells[these], self.group[these])  # type: ignore[misc]


def _special(thread: Array, threads: int, grid: tuple[int, int, int], program: Array) -> dict[str, Array]:
    x, y, z = grid
    values = {
        "%tid.x": thread,
        "%tid.y": 0,
        "%tid.z": 0,
        "%laneid": thread % WARP,
        "%warpid": thread // WARP,
        "%ntid.x": threads,
        "%ctaid.x": program % x,
        "%ctaid.y": program // x % y,
        "%ctaid.z": program // (x * y),
        "%nctaid.x": x,
        "%nctaid.y": y,
        "%nctaid.z": z,
    }
    return {name: numpy.atleast_1d(value).astype(numpy.uint32) for name, value in values.items()}
