"""Held: the values that an object holds, be it a cache with its layers or the arguments of a call, and the way to
each.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Steps from an object to something that it holds: names of attributes, and in containers keys and indices.
Step = tuple[str, Any]
Way = tuple[Step, ...]

_ATTRIBUTE, _ITEM = "attribute", "item"
_SIMPLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def item(*keys: Any) -> Way:
    """The way through containers that lie in each other."""
    return tuple((_ITEM, key) for key in keys)


def values_held(owner: object) -> dict[Way, Any]:
    """Every tensor and every simple value (number, flag, name, None) in an object, its attributes and containers, by
    the way to it; modules are not looked into.
    """
    return dict(_values(owner, (), set()))


def tensors_held(owner: object) -> dict[Way, Tensor]:
    """The tensors among `values_held`."""
    return {way: value for way, value in values_held(owner).items() if isinstance(value, Tensor)}


def held_at(owner: Any, way: Way) -> Any:
    """What is held there. Raises LookupError or AttributeError where the way leads nowhere."""
    for kind, step in way:
        owner = getattr(owner, step) if kind == _ATTRIBUTE else owner[step]
    return owner


def with_held(structure: Any, values: Mapping[Way, Any], way: Way = ()) -> Any:
    """Tuples, lists and dictionaries in each other with other values at some places; what else they hold is shared."""
    if way in values:
        return values[way]
    if isinstance(structure, dict):
        return {key: with_held(held, values, (*way, (_ITEM, key))) for key, held in structure.items()}
    if type(structure) in (list, tuple):
        return type(structure)(with_held(held, values, (*way, (_ITEM, index))) for index, held in enumerate(structure))
    return structure


@dataclass(frozen=True)
class Mould:
    """An object without the tensors that it held at `ways`; `shared`: parts of it that copies have in common."""

    owner: Any
    ways: tuple[Way, ...]
    shared: tuple[Any, ...]

    @classmethod
    def of(cls, owner: Any, ways: Sequence[Way]) -> "Mould":
        """That of an object, which is left as it is."""
        memo = {id(held_at(owner, way)): torch.empty(0) for way in ways}
        emptied = copy.deepcopy(owner, memo)
        return cls(emptied, tuple(ways), tuple(_beside(emptied, ways)))

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """A copy of the object that holds these tensors."""
        memo: dict[int, Any] = {
            id(held_at(self.owner, way)): held for way, held in zip(self.ways, tensors, strict=True)
        }
        memo |= {id(part): part for part in self.shared}
        return copy.deepcopy(self.owner, memo)


def _beside(owner: Any, ways: Sequence[Way]) -> Iterator[Any]:
    """The entries of the containers that the ways lead through, as far as no way leads through them."""
    for length in range(max((len(way) for way in ways), default=0)):
        for begin in dict.fromkeys(way[:length] for way in ways if len(way) > length):
            container = held_at(owner, begin)
            if isinstance(container, list | tuple):
                through = {way[length][1] for way in ways if way[:length] == begin}
                yield from (held for index, held in enumerate(container) if index not in through)


def _values(owner: Any, way: Way, within: set[int]) -> Iterator[tuple[Way, Any]]:
    if isinstance(owner, (Tensor, *_SIMPLE)):
        yield way, owner
        return
    if isinstance(owner, nn.Module | type) or id(owner) in within:
        return
    within = within | {id(owner)}
    if isinstance(owner, Mapping):
        for key, held in owner.items():
            yield from _values(held, (*way, (_ITEM, key)), within)
    elif isinstance(owner, list | tuple):
        for index, held in enumerate(owner):
            yield from _values(held, (*way, (_ITEM, index)), within)
    for name, held in getattr(owner, "__dict__", {}).items():
        yield from _values(held, (*way, (_ATTRIBUTE, name)), within)
