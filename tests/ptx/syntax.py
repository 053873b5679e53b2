"""The text of a kernel that Triton compiled to PTX, taken apart. (PTX: NVIDIA's Parallel Thread Execution ISA, 8.x.)"""

import re
from dataclasses import dataclass

# What a register or parameter of a type takes, in bytes; a predicate is no number.
BYTES = {"pred": 0} | {f"{letter}{bits}": bits // 8 for letter in "busf" for bits in (8, 16, 32, 64)}

# What a block of instructions ends with: threads part there, or wait for each other.
ENDS = ("bra", "ret", "exit", "bar", "barrier")

_STATEMENT = re.compile(r"\s*(?:(?P<place>\.loc[^\n]*)|(?P<brace>[{}])|(?P<label>[$\w]+):(?!:)|(?P<text>[^;]+);)")
_NAME = re.compile(r"[%$]?\w+(?:\.\w+)*")


class PtxError(Exception):
    """A kernel does what it must not, or what is not known here."""


@dataclass(frozen=True)
class Instruction:
    """operation: with its modifiers and types. predicate: a register, with ! before it where it must be false.

    place: the line of the kernel's source that it comes from.
    """

    operation: str
    operands: tuple[str, ...]
    predicate: str
    text: str
    place: str

    @property
    def words(self) -> list[str]:
        return self.operation.split(".")

    @property
    def ends_block(self) -> bool:
        return self.words[0] in ENDS and self.operation != "bar.warp.sync"


@dataclass(frozen=True)
class Kernel:
    """parameters, registers: bytes of each. labels: the block that each leads to. threads: of a program."""

    name: str
    parameters: dict[str, int]
    threads: int
    registers: dict[str, int]
    blocks: tuple[tuple[Instruction, ...], ...]
    labels: dict[str, int]


def parse(ptx: str) -> Kernel:
    """Raises PtxError for a text without an entry."""
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*(.*?)\n\{", ptx, re.DOTALL)
    if not entry:
        raise PtxError("the text has no entry")
    parameters = {
        parameter.split()[-1]: BYTES[re.search(r"\.([ubsf]\d+)", parameter)[1]]  # type: ignore[index]
        for parameter in re.findall(r"\.param ([^,\n]+)", entry[2])
    }
    threads = int(re.search(r"\.reqntid (\d+)", entry[3])[1])  # type: ignore[index]
    body = _Body(ptx[entry.end() :])
    blocks = tuple(tuple(block) for block in body.blocks)
    return Kernel(entry[1], parameters, threads, body.registers, blocks, body.labels)


def operands_of(text: str) -> tuple[str, ...]:
    """Split at commas outside brackets."""
    return tuple(part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+", text))


class _Body:
    """Reads statements one by one; registers that assembly declares within braces get names of their own."""

    def __init__(self, text: str) -> None:
        self.registers: dict[str, int] = {}
        self.blocks: list[list[Instruction]] = [[]]
        self.labels: dict[str, int] = {}
        self.scopes: list[dict[str, str]] = [{}]
        self.place = ""
        comments = re.compile(r"(?m)^(?!\s*\.loc)([^\n]*?)//[^\n]*")
        for statement in _STATEMENT.finditer(comments.sub(r"\1", text)):
            if statement["place"]:
                self.place = statement["place"].partition("//")[2].strip()
            elif statement["brace"] == "{":
                self.scopes.append({})
            elif statement["brace"]:
                self.scopes.pop()
                if not self.scopes:
                    return
            elif statement["label"]:
                self._label(statement["label"])
            else:
                self._statement(" ".join(statement["text"].split()))

    def _label(self, name: str) -> None:
        if name.startswith(("$L__tmp", "$L__func")):
            return
        if self.blocks[-1]:
            self.blocks.append([])
        self.labels[name] = len(self.blocks) - 1

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            _, kind, names = text.split(maxsplit=2)
            for name in names.split(","):
                self._declare(name.strip(), BYTES[kind.lstrip(".")])
        elif not text.startswith("."):
            found = re.fullmatch(r"(?:@(!?%?\w+) )?(\S+)\s*(.*)", text)
            assert found
            predicate, operation, rest = found.groups()
            operands = operands_of(self._renamed(rest))
            instruction = Instruction(operation, operands, self._renamed(predicate or ""), text, self.place)
            self.blocks[-1].append(instruction)
            if instruction.ends_block:
                self.blocks.append([])

    def _declare(self, name: str, size: int) -> None:
        if several := re.fullmatch(r"(%\w+?)<(\d+)>", name):
            self.registers |= {f"{several[1]}{number}": size for number in range(int(several[2]))}
        else:
            self.scopes[-1][name] = f"{name}#{len(self.registers)}"
            self.registers[self.scopes[-1][name]] = size

    def _renamed(self, text: str) -> str:
        known = {name: own for scope in self.scopes for name, own in scope.items()}
        return _NAME.sub(lambda name: known.get(name[0], name[0]), text) if known else text
