"""Kernels with one thing taken out: whether the checks, or the numbers, notice says what they are worth."""

import re
from collections.abc import Iterator

# What is taken out of a kernel's text, each time it is there: the group of each pattern.
TAKEN_OUT = {
    "barrier": re.compile(r"\n\s*(bar\.sync\s+\w+;)"),
    "wait for copies": re.compile(r"\n\s*(cp\.async\.wait_group\s+\w+;)"),
    "end of a group of copies": re.compile(r"\n\s*(cp\.async\.commit_group;)"),
    "fence": re.compile(r"\n\s*(fence\.proxy\.async[^;]*;)"),
    "predicate of a load": re.compile(r"\n\s*(@!?%p\d+ )ld\.global"),
    "predicate of a store": re.compile(r"\n\s*(@!?%p\d+ )st\.global"),
    "size of a copy": re.compile(r"cp\.async\.c[ag][^;]*(, %r\d+);"),
}


def mutants(ptx: str) -> Iterator[tuple[str, int, str]]:
    """What was taken out, in which line, and what is left."""
    for what, pattern in TAKEN_OUT.items():
        for found in pattern.finditer(ptx):
            yield what, ptx.count("\n", 0, found.end()), ptx[: found.start(1)] + ptx[found.end(1) :]
