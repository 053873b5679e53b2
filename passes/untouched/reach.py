"""Reach: what the forward of a model can read and write besides its arguments.

That is more than the model's attributes: containers in them, attributes of classes, what functions close over, their
defaults, the globals that they name, and what `functools.lru_cache` remembers. All of it is found by following objects
from the model, and the names in the code of its forwards from there. Where PyTorch, NumPy or Python itself begins, that
ends: their state is their own.
"""

import functools
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

MISSING: Any = object()

Container = dict | list | set | deque
Memo = type(functools.lru_cache(lambda: None))

_NOT_FOLLOWED = frozenset({"torch", "numpy", "triton", "builtins", "kvmix_compile"}) | sys.stdlib_module_names
# Objects of these are what others keep their state in.
_HOLDS_STATE_OF_OTHERS = frozenset({"types", "collections", "weakref", "_thread", "argparse"})
_ROOTS = ("forward", "__call__")
_LOADED_LATE = (type, ModuleType, FunctionType, BuiltinFunctionType)


@dataclass(frozen=True)
class Names:
    """Some names of a namespace: globals of a file, or attributes of a class. `values`: what they have now."""

    owner: dict[str, Any] | type
    values: dict[str, Any]


@dataclass(frozen=True)
class Reach:
    """What was found. `objects`: those with attributes. `slots`: attributes that are in slots, by their owner."""

    objects: tuple[Any, ...]
    slots: tuple[tuple[Any, str], ...]
    containers: tuple[Container, ...]
    namespaces: tuple[Names, ...]
    cells: tuple[CellType, ...]
    memos: tuple[Any, ...]
    tensors: tuple[Tensor, ...]


def reach(model: nn.Module) -> Reach:
    """All that the forward of `model` reaches."""
    walk = _Walk()
    walk.follow([model])
    kept = walk.kept
    return Reach(
        objects=tuple(kept["objects"]),
        slots=tuple(kept["slots"]),
        containers=tuple(kept["containers"]),
        namespaces=tuple(walk.namespaces()),
        cells=tuple(kept["cells"]),
        memos=tuple(kept["memos"]),
        tensors=tuple(kept["tensors"]),
    )


def attributes(owner: object) -> dict[str, Any] | None:
    """The attributes of an object itself, None where it has no place for any. Its class is not asked: where an
    attribute is missing, pydantic's stand-ins raise errors of their own.
    """
    held = attribute(owner, "__dict__")
    return None if held is MISSING else held


def attribute(owner: object, name: str) -> Any:
    """An attribute that an object itself has, MISSING where it has none; its class's `__getattr__` is not asked."""
    try:
        return object.__getattribute__(owner, name)
    except AttributeError:
        return MISSING


def held_by(held: dict[Any, Any]) -> dict[Any, Any]:
    """What a dictionary holds, whatever one of a class of its own says that it does: transformers' registries import
    every model there is where they are asked for items, keys or a length, and fail where one cannot be.
    """
    return dict(_plain(held).items(held))


def hold(container: dict[Any, Any], items: dict[Any, Any]) -> None:
    """Make a dictionary hold `items` and nothing else, whatever its class does where a key is set."""
    plain = _plain(container)
    plain.clear(container)
    for key, value in items.items():
        plain.__setitem__(container, key, value)


def _plain(held: dict[Any, Any]) -> type[dict[Any, Any]]:
    return OrderedDict if isinstance(held, OrderedDict) else dict


class _Walk:
    def __init__(self) -> None:
        self.seen: dict[int, object] = {}  # holds on to what it has seen, so that no id is used twice
        self.pending: list[object] = []
        self.kept: dict[str, list[Any]] = {
            kind: [] for kind in ("objects", "slots", "containers", "cells", "memos", "tensors")
        }
        self.words: set[str] = set(_ROOTS)
        self.classes: dict[type, set[str]] = {}  # with the words that were looked up in them
        self.globals: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self.visitors: list[tuple[Any, Callable[[Any], None]]] = [
            (Tensor, self._tensor),
            (nn.Module, self._object),
            (Container, self._container),
            (tuple | frozenset, self.pending.extend),
            (type, self._class),
            (FunctionType, self._function),
            (Memo, self._memo),
            (MethodType, lambda method: self.pending.extend((method.__self__, method.__func__))),
            (functools.partial, lambda call: self.pending.extend((call.func, call.args, call.keywords))),
            (property, lambda one: self.pending.append(one.fget)),
            (staticmethod | classmethod, lambda one: self.pending.append(one.__func__)),
            (functools.cached_property, lambda one: self.pending.append(one.func)),
            (ModuleType, lambda _: None),
        ]

    def follow(self, roots: Iterable[object]) -> None:
        self.pending.extend(roots)
        while self.pending:
            while self.pending:
                self._visit(self.pending.pop())
            self._look_up_in_classes()

    def namespaces(self) -> Iterator[Names]:
        for namespace, names in self.globals.values():
            yield Names(namespace, {name: namespace.get(name, MISSING) for name in names})
        for cls in self.classes:
            if not is_anothers(cls.__module__):
                yield Names(cls, dict(vars(cls)))

    def _visit(self, value: object) -> None:
        if value is None or isinstance(value, str | bytes | int | float | complex) or id(value) in self.seen:
            return
        self.seen[id(value)] = value
        visit = next((visit for kind, visit in self.visitors if isinstance(value, kind)), None)
        if visit is not None:
            visit(value)
        elif not is_anothers(type(value).__module__) or type(value).__module__ in _HOLDS_STATE_OF_OTHERS:
            self._object(value)

    def _tensor(self, tensor: Tensor) -> None:
        self.kept["tensors"].append(tensor)

    def _object(self, owner: object) -> None:
        self._class(type(owner))
        held = attributes(owner)
        if held is not None:
            self.kept["objects"].append(owner)
            self.pending.extend(list(held.values()))
        for slot in _slots(type(owner)):
            self.kept["slots"].append((owner, slot))
            self.pending.append(attribute(owner, slot))

    def _container(self, container: Container) -> None:
        self.kept["containers"].append(container)
        held = held_by(container).values() if isinstance(container, dict) else container
        self.pending.extend(list(held))
        if type(container).__module__ != "builtins":
            self._object(container)

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            if base is not nn.Module and (issubclass(base, nn.Module) or not is_anothers(base.__module__)):
                self.classes.setdefault(base, set())

    def _look_up_in_classes(self) -> None:
        for cls, known in self.classes.items():
            held = vars(cls)
            for name in (self.words & held.keys()) - known:
                known.add(name)
                self.pending.append(held[name])
            # A name may stand for another one, as in transformers' `attribute_map`.
            for aliases in held.values():
                if isinstance(aliases, dict):
                    self.words |= {
                        other
                        for name, other in held_by(aliases).items()
                        if name in self.words and isinstance(other, str)
                    }

    def _memo(self, memo: Any) -> None:
        self.kept["memos"].append(memo)
        self.pending.append(memo.__wrapped__)

    def _function(self, function: FunctionType) -> None:
        words = set(_words(function.__code__))
        self.words |= words
        self.pending.extend((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            self.kept["cells"].append(cell)
            self.pending.append(content(cell))
        # Decorators of PyTorch's wrap functions that are not.
        self.pending.append(getattr(function, "__wrapped__", None))
        if not is_anothers(function.__globals__.get("__name__", "")):
            self.kept["objects"].append(function)
            self.pending.extend(list(vars(function).values()))
            self._globals(function.__globals__, words)

    def _globals(self, namespace: dict[str, Any], words: set[str]) -> None:
        _, known = self.globals.setdefault(id(namespace), (namespace, set()))
        new, known_before = words - known, frozenset(known)
        known |= words
        for name in new & namespace.keys():
            value = namespace[name]
            if isinstance(value, ModuleType):
                if not is_anothers(value.__name__) and not words <= known_before:
                    self._globals(vars(value), words)
            else:
                self.pending.append(value)


def content(cell: CellType) -> Any:
    """What a cell of a closure holds, MISSING where nothing."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def loaded_late(value: object) -> bool:
    """Whether it is code: what was imported when it was first needed is no state."""
    return isinstance(value, _LOADED_LATE)


def is_anothers(module: str) -> bool:
    """Whether the state of a Python module is not that of a model: `kvmix_compile` except for the models in it."""
    root = module.partition(".")[0]
    return root in _NOT_FOLLOWED and not module.startswith("kvmix_compile.models_zoo")


def _words(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _slots(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from (name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__"))
