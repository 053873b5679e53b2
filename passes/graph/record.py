"""Record: what each pass did to a graph, for the report; and the graph before and after it, to find a fault.

Set KVMIX_DUMP to a folder, and every graph is written there as it goes from pass to pass, in the order of the passes.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeVar

from torch import fx

from kvmix_compile.passes.graph.vocabulary import operation, tensor_of

DUMP = "KVMIX_DUMP"

Result = TypeVar("Result")

_numbers = count()


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    name: of the pass. matched: what it found, or changed, each in a few words. skipped: what it saw and left as it is,
    with the reason.
    """

    name: str
    matched: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{', '.join(self.matched)}" if self.matched else "nothing to do"]
        return "; ".join([*parts, *(f"left {reason}" for reason in self.skipped)])


def recorded(name: str, module: fx.GraphModule, run: Callable[[], Result]) -> tuple[PassRecord, Result]:
    """Run a pass that edits the graph of `module` in place; returns its record, and what it returned. What it matched:
    of which operations there are more or fewer since.
    """
    before = _operations(module.graph)
    dump(f"{name}-before", module.graph)
    result = run()
    dump(f"{name}-after", module.graph)
    after = _operations(module.graph)
    changed = sorted(kind for kind in before | after if before[kind] != after[kind])
    return PassRecord(name, tuple(f"{kind} {before[kind]} -> {after[kind]}" for kind in changed)), result


def dump(name: str, graph: fx.Graph) -> None:
    """Write the graph to a file of its own in the folder that KVMIX_DUMP names, if it names one."""
    folder = os.environ.get(DUMP)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = Path(folder) / f"{next(_numbers):03d}-{name.replace(' ', '-')}.txt"
        file.write_text("\n".join(_line(node) for node in graph.nodes) + "\n", encoding="utf-8")


def _operations(graph: fx.Graph) -> Counter[str]:
    return Counter(operation(node) for node in graph.nodes)


def _line(node: fx.Node) -> str:
    value = tensor_of(node)
    return f"{node.format_node()}{'' if value is None else f'  # {value.dtype} {list(value.shape)}'}"
