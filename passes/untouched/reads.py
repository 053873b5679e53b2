"""Reads: which attributes of a model's modules and configs its forward looks at, and sets, seen while it runs.

What it looks at has steered the graph that was made of it; what it does not look at has not.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from kvmix_compile.passes.untouched.reach import MISSING, attributes, is_anothers
from kvmix_compile.passes.untouched.untouched import Written

# Names by the identity of their owner.
Reads = dict[int, set[str]]


@contextmanager
def recorded_reads(model: nn.Module, written: Written) -> Iterator[Reads]:
    """Around runs of the model: the names that are read of its modules and of the configs that they hold. What is set
    goes into `written`.
    """
    reads: Reads = defaultdict(set)
    with ExitStack() as stack:
        kinds: set[type] = {nn.Module, *(type(config) for _, config in configs_of(model))}
        for kind in kinds:
            # The attributes of a class of C cannot be watched.
            if kind is not SimpleNamespace:
                _record(kind, reads, written, stack)
        yield reads


def configs_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The objects that modules hold and whose attributes are settings, each once, with a path to it."""
    seen: set[int] = set()
    pending = list(model.named_modules())[::-1]
    while pending:
        path, owner = pending.pop()
        for name, value in list((attributes(owner) or {}).items()):
            if id(value) not in seen and _is_config(value):
                seen.add(id(value))
                inner = f"{path}.{name}".lstrip(".")
                yield inner, value
                pending.append((inner, value))


def _record(kind: type, reads: Reads, written: Written, stack: ExitStack) -> None:
    """Have a class say what is read and set, until the stack is left."""
    read: Any = kind.__getattribute__
    write: Any = kind.__setattr__
    # transformers' configs have several names for one attribute.
    aliases = getattr(kind, "attribute_map", {})

    def __getattribute__(self: object, name: str) -> Any:
        reads[id(self)].add(aliases.get(name, name))
        return read(self, name)

    def __setattr__(self: object, name: str, value: Any) -> None:
        written.add(self, [aliases.get(name, name)])
        write(self, name, value)

    for method in (__getattribute__, __setattr__):
        stack.callback(_set_back, kind, method.__name__, vars(kind).get(method.__name__, MISSING))
        setattr(kind, method.__name__, method)


def _set_back(kind: type, name: str, method: Any) -> None:
    if method is MISSING:
        delattr(kind, name)
    else:
        setattr(kind, name, method)


def _is_config(value: object) -> bool:
    if isinstance(value, nn.Module | torch.Tensor | type | dict | list) or callable(value):
        return False
    return attributes(value) is not None and (
        isinstance(value, SimpleNamespace) or not is_anothers(type(value).__module__)
    )
