"""What several commands take, and what of it can be checked before anything is loaded."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from os import W_OK, access
from pathlib import Path
from typing import Annotated, Any

import typer

from kvmix_command.known import DEFAULT_BUDGET, MODELS, POLICIES

STANDARD_OUTPUT = Path("-")

# A number of bytes as people write it: 80GB is eighty times a thousand million, 80GiB eighty times 2**30.
_MEMORY = re.compile(r"(?P<number>\d+(\.\d+)?)\s*((?P<prefix>[KMGT])(?P<binary>i)?)?B", re.IGNORECASE)
_PREFIXES = "KMGT"


def writable(path: Path | None) -> Path | None:
    """The path as it is. Raises typer.BadParameter where no file can be made there."""
    if path is not None and path != STANDARD_OUTPUT and not (path.parent.is_dir() and access(path.parent, W_OK)):
        raise typer.BadParameter(f"cannot write {path}: give a file in a folder that exists and can be written to")
    return path


def memory_bytes(written: str) -> int:
    """How many bytes that is. Raises typer.BadParameter where it is no number of bytes, or none at all."""
    read = _MEMORY.fullmatch(written.strip())
    power = _PREFIXES.index(read["prefix"].upper()) + 1 if read and read["prefix"] else 0
    count = int(float(read["number"]) * (1024 if read["binary"] else 1000) ** power) if read else 0
    if not count:
        raise typer.BadParameter(f"{written} is no number of bytes: write 80GB (80 * 1000**3) or 80GiB (80 * 1024**3)")
    return count


def models_and_folders(incomplete: str) -> Iterator[str]:
    """What the name of a model that begins so may become: the zoo's, and folders and files where it is a path."""
    yield from (name for name in MODELS if name.startswith(incomplete))
    typed = Path(incomplete)
    folder, begun = (typed, "") if incomplete.endswith("/") else (typed.parent, typed.name)
    for path in sorted(folder.glob("*")):
        if incomplete and path.name.startswith(begun) and (path.is_dir() or path.suffix in (".gguf", ".safetensors")):
            yield f"{path}/" if path.is_dir() else str(path)


def choice(flag: str, names: Sequence[str], help: str, what: str = "") -> Any:
    """An option, or list of options, that is one of `names`: checked, completed, and listed in its help. what: it is
    called, if not as the option.
    """

    def checked(given: Any) -> Any:
        for name in [given] if isinstance(given, str) else given or ():
            if name not in names:
                close = get_close_matches(name, names, n=1)
                meant = f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)}"
                raise typer.BadParameter(f"there is no {what or flag.lstrip('-')} {name}; {meant}")
        return given

    def completed(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return typer.Option(
        flag, metavar="NAME", help=f"{help}: {', '.join(names)}.", callback=checked, autocompletion=completed
    )


def check_one_of(*options: tuple[str, object]) -> None:
    """Raise typer.BadParameter where more than one of these options, named beside their values, is given."""
    given = [name for name, value in options if value is not None and value is not False]
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} exclude each other: choose one")


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=f"A folder or name that transformers knows, a .gguf or .safetensors file, or one of: {', '.join(MODELS)}.",
        autocompletion=models_and_folders,
    ),
]
PolicyName = Annotated[str, choice("--policy", POLICIES, "How bits are allocated, kvmix being the paper's way")]
Budget = Annotated[float | None, typer.Option(help=f"Mean code bits per cached element (default {DEFAULT_BUDGET}).")]
StorageBudget = Annotated[
    float | None, typer.Option(help="Instead, mean stored bits: scales and zero points counted too.")
]
SavedPlan = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help="A plan that `kvmix plan` saved.")
]
Context = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of the texts that the budget is for (default: MODEL's, 8192 at most)."),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration", exists=True, dir_okay=False, readable=True,
        help="Text to measure importance on; else built-in English.",
    ),
]  # fmt: skip
NewTokens = Annotated[int, typer.Option(min=1, help="The most tokens to write.")]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", allow_dash=True, dir_okay=False, writable=True, callback=writable,
        help="Where to write what a program would read; - is standard output, where then nothing else goes.",
    ),
]  # fmt: skip
