"""Launched: a command that torchrun starts in several processes is one command, for which the first one speaks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import typer


def processes() -> int:
    """How many torchrun started; 1 without it."""
    # These are torchrun's own: others set WORLD_SIZE too.
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_first() -> bool:
    """Whether this process is the first of them, or the only one: the one that writes files and to standard output."""
    return processes() == 1 or os.environ["RANK"] == "0"


def check_one_process(command: str) -> None:
    """Raise typer.BadParameter where there are several."""
    if (count := processes()) > 1:
        raise typer.BadParameter(
            f"kvmix {command} works in one process, and torchrun started {count}: doctor, plan, report, generate, chat "
            "and eval spread MODEL over several"
        )


@contextmanager
def first_one_speaks() -> Iterator[None]:
    """Around what a command does: standard output is that of the first process. Errors are everybody's."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
