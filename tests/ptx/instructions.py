"""Each instruction as a step of the machine. What only computes is in arithmetic.FORMS, the rest in ACTIONS."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy

from tests.ptx import matrices
from tests.ptx.arithmetic import Form, form
from tests.ptx.machine import Machine, Mask, Step
from tests.ptx.numbers import KINDS, PREDICATE, UNSIGNED, Array, Kind
from tests.ptx.syntax import Instruction, PtxError, operands_of, parse

Read = Callable[[Machine], Array]
Write = Callable[[Machine, Array, Mask], None]

B32, B64 = KINDS["b32"], KINDS["b64"]


class Compiler:
    """Makes each instruction of a kernel a step of the machine, once. ptx: the kernel's text."""

    def __init__(self, ptx: str) -> None:
        self.ptx, self.kernel = ptx, parse(ptx)
        self.steps: dict[int, Step] = {}

    @contextmanager
    def instead(self, ptx: str) -> Iterator[None]:
        """Another text in place of the kernel's."""
        before = self.kernel, self.steps
        self.kernel, self.steps = parse(ptx), {}
        try:
            yield
        finally:
            self.kernel, self.steps = before

    def step(self, instruction: Instruction) -> Step:
        """Raises PtxError for an instruction that is not known."""
        found = self.steps.get(id(instruction))
        if found is None:
            found = self.steps[id(instruction)] = self._predicated(instruction, self._made(instruction))
        return found

    def _made(self, instruction: Instruction) -> Step:
        words = instruction.words
        several = any(operand.startswith("{") for operand in instruction.operands)
        arithmetic = None if several and words[0] == "mov" else form(words)
        if arithmetic:
            return self._computed(arithmetic, instruction)
        if words[0] not in ACTIONS:
            raise PtxError("this instruction is not known here")
        return ACTIONS[words[0]](self, instruction)

    def _predicated(self, instruction: Instruction, step: Step) -> Step:
        if not instruction.predicate:
            return step
        predicate = self.read(instruction.predicate, PREDICATE)

        def run(machine: Machine, mask: Mask) -> None:
            chosen = machine.everywhere(predicate(machine))
            chosen = chosen if mask is None else chosen & mask
            if chosen.any():
                step(machine, chosen)

        return run

    def _computed(self, arithmetic: Form, instruction: Instruction) -> Step:
        target, *sources = instruction.operands
        kinds = arithmetic.sources
        if len(sources) != len(kinds):
            raise PtxError(f"{len(kinds)} operands are known here, not {len(sources)}")
        reads = [self.read(source, kind) for source, kind in zip(sources, kinds, strict=True)]
        write, result = self.write(target, arithmetic.result), arithmetic.result

        def run(machine: Machine, mask: Mask) -> None:
            write(machine, result.bits(arithmetic.compute(*[read(machine) for read in reads])), mask)

        return run

    def read(self, operand: str, kind: Kind) -> Read:
        """The numbers of an operand: register, special register, or constant."""
        if operand.startswith("!"):
            positive = self.read(operand[1:], kind)
            return lambda machine: ~positive(machine)
        if operand in self.kernel.registers:
            if self.kernel.registers[operand] == kind.size:
                return lambda machine: kind.numbers(machine.registers[operand])
            # Of a wider register the lower bits.
            return lambda machine: kind.numbers(machine.registers[operand].astype(UNSIGNED[kind.size]))
        if operand.startswith("%"):
            return lambda machine: kind.numbers(machine.special[operand])
        constant = kind.numbers(numpy.array([_constant(operand, kind)], UNSIGNED[kind.size]))
        return lambda machine: constant

    def reads(self, operand: str, kind: Kind) -> list[Read]:
        """Of a vector, {a, b}, each; else of the operand alone."""
        return [self.read(part, kind) for part in _parts(operand)]

    def write(self, operand: str, kind: Kind) -> Write:
        """Into a register; a wider one has the number's sign, where it has one, above it."""
        if operand == "_":
            return lambda machine, bits, mask: None
        if operand not in self.kernel.registers:
            raise PtxError(f"{operand} is no register")
        size = self.kernel.registers[operand]
        if size == kind.size:
            return lambda machine, bits, mask: machine.write(operand, bits, mask)
        if kind.is_signed:
            signed = numpy.dtype(f"i{size}")
            return lambda machine, bits, mask: machine.write(
                operand, kind.numbers(bits).astype(signed).view(UNSIGNED[size]), mask
            )
        return lambda machine, bits, mask: machine.write(operand, bits.astype(UNSIGNED[size]), mask)

    def writes(self, operand: str, kind: Kind) -> Callable[[Machine, list[Array], Mask], None]:
        targets = [self.write(part, kind) for part in _parts(operand)]

        def run(machine: Machine, values: list[Array], mask: Mask) -> None:
            for write, value in zip(targets, values, strict=True):
                write(machine, value, mask)

        return run

    def address(self, operand: str) -> Read:
        """[register + offset]"""
        found = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        assert found, operand
        kind = KINDS[f"u{8 * self.kernel.registers.get(found[1], 4)}"]
        base, offset = self.read(found[1], kind), self.read(found[2] or "0", kind)
        return lambda machine: base(machine) + offset(machine)


def _parts(operand: str) -> tuple[str, ...]:
    return operands_of(operand.strip("{} ")) if operand.startswith("{") else (operand,)


def _constant(text: str, kind: Kind) -> int:
    if text == "global_smem":
        return 0
    # 0f and 0d: the bits of a float.
    number = int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text.rstrip("U"), 0)
    return number & ((1 << 8 * kind.size) - 1) if kind.size else number


def _kind(instruction: Instruction) -> Kind:
    return KINDS[instruction.words[-1]]


def _numbers(reads: list[Read], machine: Machine) -> list[Array]:
    return [read(machine) for read in reads]


# Moves


def _move(compiler: Compiler, instruction: Instruction) -> Step:
    """Registers side by side into one, or one into several."""
    target, source = instruction.operands
    whole = _kind(instruction)
    several = _parts(target if target.startswith("{") else source)
    part = KINDS[f"b{8 * whole.size // len(several)}"]
    shifts = [UNSIGNED[whole.size](8 * part.size * place) for place in range(len(several))]
    if target.startswith("{"):
        read, writes = compiler.read(source, whole), compiler.writes(target, part)
        return lambda machine, mask: writes(
            machine, [(read(machine) >> shift).astype(UNSIGNED[part.size]) for shift in shifts], mask
        )
    reads, write = compiler.reads(source, part), compiler.write(target, whole)

    def join(machine: Machine, mask: Mask) -> None:
        joined = UNSIGNED[whole.size](0)
        for value, shift in zip(_numbers(reads, machine), shifts, strict=True):
            joined = joined | value.astype(UNSIGNED[whole.size]) << shift
        write(machine, joined, mask)

    return join


def _load(compiler: Compiler, instruction: Instruction) -> Step:
    target, source = instruction.operands
    kind, words = _kind(instruction), instruction.words
    writes, parts = compiler.writes(target, kind), len(_parts(target))
    if "param" in words:
        name = source.strip("[]")
        return lambda machine, mask: writes(machine, [machine.parameters[name]], mask)
    address, shared = compiler.address(source), _is_shared(instruction)
    return lambda machine, mask: writes(machine, machine.load(shared, address(machine), kind.size, parts, mask), mask)


def _store(compiler: Compiler, instruction: Instruction) -> Step:
    target, source = instruction.operands
    kind, shared = KINDS[f"b{8 * _kind(instruction).size}"], _is_shared(instruction)
    address, reads = compiler.address(target), compiler.reads(source, kind)
    return lambda machine, mask: machine.store(shared, address(machine), kind.size, _numbers(reads, machine), mask)


def _is_shared(instruction: Instruction) -> bool:
    shared = any(word.startswith("shared") for word in instruction.words)
    if not shared and "global" not in instruction.words:
        raise PtxError("memory that is neither global nor shared is not known here")
    return shared


def _copy(compiler: Compiler, instruction: Instruction) -> Step:
    what, operands = instruction.words[2], instruction.operands
    if what == "commit_group":
        return lambda machine, mask: machine.close_group(mask)
    if what == "wait_group":
        left = int(operands[0])
        return lambda machine, mask: machine.wait_for_copies(left, mask)
    if what not in ("ca", "cg"):
        raise PtxError("copies of this kind are not known here")
    to, source, size = compiler.address(operands[0]), compiler.address(operands[1]), int(operands[2], 0)
    bytes_read = compiler.read(operands[3] if len(operands) > 3 else operands[2], B32)
    return lambda machine, mask: machine.copy(to(machine), source(machine), size, bytes_read(machine), mask)


# Control


def _branch(compiler: Compiler, instruction: Instruction) -> Step:
    block = compiler.kernel.labels[instruction.operands[0]]
    return lambda machine, mask: machine.go_to(block, mask)


def _end(compiler: Compiler, instruction: Instruction) -> Step:
    return lambda machine, mask: machine.end(mask)


def _barrier(compiler: Compiler, instruction: Instruction) -> Step:
    if instruction.operation == "bar.warp.sync":
        return lambda machine, mask: machine.check_whole_warps(mask)
    if instruction.operands != ("0",):
        raise PtxError("barriers of a part of a program are not known here")
    return lambda machine, mask: machine.wait_for_all(mask)


def _fence(compiler: Compiler, instruction: Instruction) -> Step:
    if instruction.words[1] != "proxy":
        return lambda machine, mask: None
    return lambda machine, mask: machine.shared.fence(numpy.unique(machine.warp[machine.threads(mask)]))


# Warps


def _shuffle(compiler: Compiler, instruction: Instruction) -> Step:
    target, *sources = instruction.operands
    if sources[-1] not in ("-1", "0xffffffff", "0xFFFFFFFF"):
        raise PtxError("shuffles among a part of a warp are not known here")
    how, write = instruction.words[2], compiler.write(target, B32)
    reads = [compiler.read(source, B32) for source in sources[:-1]]
    return lambda machine, mask: write(machine, matrices.shuffle(machine, how, *_numbers(reads, machine), mask), mask)


def _load_matrices(compiler: Compiler, instruction: Instruction) -> Step:
    target, source = instruction.operands
    writes, address, count = compiler.writes(target, B32), compiler.address(source), len(_parts(target))
    transposed = "trans" in instruction.words
    return lambda machine, mask: writes(
        machine, matrices.load_matrices(machine, address(machine), count, transposed, mask), mask
    )


def _store_matrices(compiler: Compiler, instruction: Instruction) -> Step:
    target, source = instruction.operands
    address, reads, transposed = compiler.address(target), compiler.reads(source, B32), "trans" in instruction.words
    return lambda machine, mask: matrices.store_matrices(
        machine, address(machine), _numbers(reads, machine), transposed, mask
    )


def _multiply(compiler: Compiler, instruction: Instruction) -> Step:
    words = instruction.words
    kind = words[7]
    if words[3:6] != ["m16n8k16", "row", "col"] or kind not in ("f16", "bf16") or words[9] != "f32":
        raise PtxError("products of this shape are not known here")
    target, *sources = instruction.operands
    writes, (a, b, c) = compiler.writes(target, B32), [compiler.reads(source, B32) for source in sources]
    return lambda machine, mask: writes(
        machine, matrices.multiply(machine, kind, *(_numbers(x, machine) for x in (a, b, c)), mask), mask
    )


def _multiply_in_groups(compiler: Compiler, instruction: Instruction) -> Step:
    words, operands = instruction.words, instruction.operands
    if words[1] == "fence":
        return lambda machine, mask: machine.check_whole_warps(mask)
    if words[1] != "mma_async":
        return lambda machine, mask: None
    sums, left, right, accumulate, *scales = operands
    in_registers = left.startswith("{")
    if scales[:2] != ["1", "1"]:
        raise PtxError("products with another sign are not known here")
    turned = [flag == "1" for flag in scales[2:]]
    transposed = (False, turned[0]) if in_registers else (turned[0], turned[1])
    writes, reads = compiler.writes(sums, B32), compiler.reads(sums, B32)
    left_reads, read_right = compiler.reads(left, B32 if in_registers else B64), compiler.read(right, B64)
    kept = compiler.read(accumulate, PREDICATE)

    def run(machine: Machine, mask: Mask) -> None:
        a = _numbers(left_reads, machine)
        operands = a if in_registers else a[0], read_right(machine), kept(machine), transposed, mask
        before = _numbers(reads, machine)
        writes(machine, matrices.multiply_in_groups(machine, words[4], words[-1], before, *operands), mask)

    return run


ACTIONS: dict[str, Callable[[Compiler, Instruction], Step]] = {
    "mov": _move,
    "ld": _load,
    "st": _store,
    "cp": _copy,
    "bra": _branch,
    "ret": _end,
    "exit": _end,
    "bar": _barrier,
    "barrier": _barrier,
    "fence": _fence,
    "shfl": _shuffle,
    "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices,
    "mma": _multiply,
    "wgmma": _multiply_in_groups,
}
