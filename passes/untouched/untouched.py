"""Untouched: whatever a model's forward changes while it is captured, measured or verified is put back.

A forward may make state when it first runs: attributes, buffers, tables by length, what `lru_cache` remembers. Under
`torch.export` that state is made of fake tensors and symbols, so that none of it may stay; and what a real run makes is
not what the user asked for. So every run of a model's own code is within `untouched`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn

from kvmix_compile.passes.untouched.reach import (
    MISSING,
    Container,
    Names,
    attribute,
    attributes,
    content,
    held_by,
    hold,
    loaded_late,
    reach,
)

# Of larger tensors no copy is kept: weights, which no forward writes to. See passes/untouched/writes.py.
LARGEST_STATE = 2**20  # bytes


class Written:
    """Which attributes of objects, and keys of dictionaries, were changed and put back; filled when they are."""

    def __init__(self) -> None:
        self._names: dict[int, set[str]] = {}

    def add(self, owner: object, names: Iterable[str]) -> None:
        self._names.setdefault(id(owner), set()).update(names)

    def by_owner(self, owner: object) -> frozenset[str]:
        """The names at an object, or in a container (indices are no names: "" stands for any); empty for one that was
        not changed.
        """
        return frozenset(self._names.get(id(owner), ()))


@contextmanager
def untouched(model: nn.Module) -> Iterator[Written]:
    """Around runs of the model's own code. Afterwards, failed or not, all that its forward reaches is as it was."""
    found, written = reach(model), Written()
    objects = [(owner, dict(attributes(owner) or {})) for owner in found.objects]
    slots = [(owner, name, attribute(owner, name)) for owner, name in found.slots]
    containers = [(container, _items(container)) for container in found.containers]
    cells = [(cell, content(cell)) for cell in found.cells]
    memos = [(memo, memo.cache_info().misses) for memo in found.memos]
    tensors = [(tensor, _version(tensor), tensor.detach().clone()) for tensor in found.tensors if is_state(tensor)]
    try:
        yield written
    finally:
        for owner, saved in objects:
            _put_back_attributes(owner, saved, written)
        for owner, name, value in slots:
            _put_back_slot(owner, name, value)
        for container, items in containers:
            _put_back_items(container, items, written)
        for names in found.namespaces:
            _put_back_names(names)
        for cell, value in cells:
            _put_back_content(cell, value)
        for memo, misses in memos:
            if memo.cache_info().misses != misses:
                memo.cache_clear()
        for tensor, version, copy in tensors:
            if version is None or _version(tensor) != version:
                _write(tensor, copy)


def is_state(tensor: Tensor) -> bool:
    """Whether a tensor that a model holds is small enough to be one that its forward writes to."""
    return (
        type(tensor) is Tensor
        and tensor.device.type != "meta"
        and tensor.layout is torch.strided
        and tensor.nbytes <= LARGEST_STATE
    )


def _put_back_attributes(owner: object, saved: dict[str, Any], written: Written) -> None:
    now = attributes(owner)
    if now is None or _is_same(now, saved):
        return
    # Export itself puts copies in the place of containers.
    names = [name for name in now.keys() | saved.keys() if not _alike(now.get(name, MISSING), saved.get(name, MISSING))]
    if names:
        written.add(owner, names)
    # In place and past __setattr__, which modules have made their own.
    now.clear()
    now.update(saved)


def _put_back_slot(owner: object, name: str, value: Any) -> None:
    if attribute(owner, name) is value:
        return
    if value is MISSING:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, value)


def _put_back_items(container: Container, items: Any, written: Written) -> None:
    if isinstance(container, dict):
        now = held_by(container)
        if _is_same(now, items):
            return
        changed = [
            str(key) for key in now.keys() | items.keys() if now.get(key, MISSING) is not items.get(key, MISSING)
        ]
        hold(container, items)
    elif len(container) != len(items) or any(a is not b for a, b in zip(container, items, strict=True)):
        changed = [""]
        container.clear()
        container.update(items) if isinstance(container, set) else container.extend(items)
    else:
        return
    written.add(container, changed)


def _put_back_names(names: Names) -> None:
    owner, saved = names.owner, names.values
    now = vars(owner) if isinstance(owner, type) else owner
    known = saved.keys() | now.keys() if isinstance(owner, type) else saved.keys()
    for name in known:
        before, after = saved.get(name, MISSING), now.get(name, MISSING)
        if before is after or loaded_late(after):
            continue
        if isinstance(owner, type):
            delattr(owner, name) if before is MISSING else setattr(owner, name, before)
        elif before is MISSING:
            del owner[name]
        else:
            owner[name] = before


def _put_back_content(cell: CellType, value: Any) -> None:
    if content(cell) is value:
        return
    if value is MISSING:
        del cell.cell_contents
    else:
        cell.cell_contents = value


def _items(container: Container) -> Any:
    return held_by(container) if isinstance(container, dict) else list(container)


def _is_same(now: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    """Whether two dictionaries hold the same objects by the same keys, in the same order."""
    return len(now) == len(saved) and all(
        a is b and first is second for (a, first), (b, second) in zip(now.items(), saved.items(), strict=True)
    )


def _alike(now: Any, saved: Any) -> bool:
    """Whether two values are one, or containers of what is."""
    if now is saved:
        return True
    if type(now) is not type(saved) or not isinstance(now, dict | list | tuple):
        return False
    if isinstance(now, dict):
        held, before = held_by(now), held_by(saved)
        return held.keys() == before.keys() and all(_alike(held[key], before[key]) for key in held)
    return len(now) == len(saved) and all(_alike(a, b) for a, b in zip(now, saved, strict=True))


def _version(tensor: Tensor) -> tuple[int, int] | None:
    """What changes with a tensor's values; None where nothing tells."""
    return None if tensor.is_inference() else (tensor._version, tensor.data_ptr())


def _write(tensor: Tensor, values: Tensor) -> None:
    with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
        if tensor.shape == values.shape:
            tensor.copy_(values)
        else:
            tensor.data = values
