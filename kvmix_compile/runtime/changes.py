"""Changes: what was done to a model after it was compiled, and that its graph does not know of.

A graph reads weights from the live model, so that they may be loaded, merged in place or replaced. Everything else that
steers a forward is written into the graph: which modules there are, their hooks, and the settings that it reads. Where
one of those has changed, the graph is no longer the model's.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kvmix_compile.errors import InputError
from kvmix_compile.passes.untouched.assigned import assigned_names
from kvmix_compile.passes.untouched.reach import MISSING, attributes
from kvmix_compile.passes.untouched.reads import Reads, configs_of
from kvmix_compile.passes.untouched.untouched import Written

# What a compiled model looks at itself whenever it is called.
_ANSWERED = frozenset(
    {"use_cache", "generation_config", "output_attentions", "_output_attentions", "output_hidden_states"}
)
# What steers every module, whatever its code.
_OF_MODULES = frozenset({"training", "forward"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TENSORS = ("_parameters", "_buffers")
# What every module has beside that, and what is read of its class.
_STANDARD = frozenset(vars(nn.Module())) | frozenset(dir(nn.Module))

_CONTAINERS = (dict, list, tuple, deque, set, frozenset)
_VALUES = (bool, int, float, complex, str, bytes, Enum, torch.dtype, frozenset, MethodType)


@dataclass(frozen=True)
class _Holder:
    """Names and values that belong together: of an object, or (`kind`) of one of the dictionaries of a module."""

    path: str
    owner: object
    held: dict[str, Any]
    kind: str = ""

    def of(self, name: str) -> str:
        return ".".join(part for part in (self.path, self.kind, str(name)) if part)


@dataclass(frozen=True)
class Steering:
    """What steers the forward of a model. `read`: by the path of a module or config, the attributes that it reads.
    `own`: paths of what it writes itself, which may differ from run to run.
    """

    read: Mapping[str, frozenset[str]]
    own: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, reads: Reads, written: Written) -> "Steering":
        """From what the model's forward was seen to read and to change."""
        holders = list(_holders(model))
        own = {holder.of(name) for holder in holders for name in written.by_owner(holder.owner)}
        own |= {
            holder.of(name)
            for holder in holders
            for name, value in holder.held.items()
            if any(written.by_owner(container) for container in _containers(value))
        }
        own |= _state(model, holders)
        return cls({holder.path: _read(holder, reads) for holder in holders if not holder.kind}, frozenset(own))


class Changes:
    """Remembers how a model and its twin are when it is made."""

    def __init__(self, steering: Steering, model: nn.Module, twin: nn.Module) -> None:
        self.steering = steering
        modules = list(model.named_modules())
        self.types = tuple((path, module, type(module)) for path, module in modules)
        self.forwards = tuple((kind, kind.forward) for kind in {type(module) for _, module in modules})
        own = list(_holders(model))
        # A twin has the original's parameters and buffers; its own hooks run when it is called, around its graph.
        twins = [it for it in _holders(twin) if it.kind not in _TENSORS and (it.path or it.kind not in _HOOKS)]
        self.values = tuple(entry for holder in (*own, *twins) for entry in self._entries(holder))
        self.sizes = tuple((holder, holder.held, len(holder.held)) for holder in (*own, *twins) if holder.kind)
        self.twins = frozenset(map(id, twins))

    def check(self) -> None:
        """Raise InputError where something has changed that the graph does not follow."""
        for path, module, kind in self.types:
            if type(module) is not kind:
                raise _error(f"{path or 'the model'} was a {kind.__name__} and is a {type(module).__name__}")
        for kind, forward in self.forwards:
            if kind.forward is not forward:
                raise _error(f"the forward of {kind.__name__} was replaced")
        for holder, held, name, otherwise, see, then in self.values:
            now = held.get(name, otherwise)
            if now is then:  # as nearly all are; what can be written to is never seen as itself
                continue
            now = see(now)
            if not _is_same(now, then) and (name != "training" or now):
                raise _error(_described(holder, name, now, then), id(holder) in self.twins)
        for holder, held, size in self.sizes:
            if len(held) != size:
                self._check_added(holder)

    def _entries(
        self, holder: _Holder
    ) -> Iterator[tuple[_Holder, dict[str, Any], str, Any, Callable[[Any], Any], Any]]:
        """What is watched of a holder: by which name, what its class has by that name, how it is looked at, and what is
        seen now.
        """
        see = _SEEN_AS.get(holder.kind, _frozen)
        for name in list(holder.held) if holder.kind else sorted(self.steering.read.get(holder.path, ())):
            if holder.of(name) not in self.steering.own:
                otherwise = MISSING if holder.kind else getattr(type(holder.owner), name, MISSING)
                if isinstance(otherwise, (*_CONTAINERS, Tensor)):  # state, which instances share
                    otherwise = MISSING
                yield holder, holder.held, name, otherwise, see, see(holder.held.get(name, otherwise))

    def _check_added(self, holder: _Holder) -> None:
        known = {name for other, _, name, *_ in self.values if other is holder}
        for name in holder.held.keys() - known:
            if holder.kind in _HOOKS and _is_librarys(holder.held[name]):
                continue
            is_read = holder.kind not in _TENSORS or name in self.steering.read[holder.path]
            if is_read and holder.of(name) not in self.steering.own:
                raise _error(_described(holder, name, holder.held[name], MISSING), id(holder) in self.twins)


def _holders(model: nn.Module) -> Iterator[_Holder]:
    """The attributes of each module and of the configs that they hold, each once, and the dictionaries of a module."""
    for path, module in model.named_modules():
        held = vars(module)
        yield _Holder(path, module, held)
        for kind in ("_modules", *_HOOKS, *_TENSORS):
            yield _Holder(path, held[kind], held[kind], kind)
    for path, config in configs_of(model):
        yield _Holder(path, config, attributes(config) or {})


def _read(holder: _Holder, reads: Reads) -> frozenset[str]:
    """Which of the attributes of a holder are read, or would be if there were such."""
    if isinstance(holder.owner, SimpleNamespace):
        return frozenset(holder.held)
    read = {name for name in reads.get(id(holder.owner), ()) if not name.startswith("__")} - _ANSWERED
    if isinstance(holder.owner, nn.Module):
        children = (name for kind in ("_modules", *_TENSORS) for name in holder.held[kind])
        read = (read - _STANDARD).difference(children) | _OF_MODULES
    return frozenset(read)


def _state(model: nn.Module, holders: list[_Holder]) -> set[str]:
    """Paths of the attributes of modules that hold a tensor, or yet none, and that the model's own code writes."""
    assigned = assigned_names(model)
    return {
        holder.of(name)
        for holder in holders
        if isinstance(holder.owner, nn.Module) and not holder.kind
        for name in assigned & holder.held.keys()
        if holder.held[name] is None or isinstance(holder.held[name], Tensor)
    }


def _containers(value: object) -> Iterator[object]:
    if isinstance(value, _CONTAINERS):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


def _is_librarys(hook: Any) -> bool:
    """Whether a hook is one of those by which transformers notes what layers give, on any that ever ran by itself."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _frozen(value: Any) -> Any:
    """What stays as it is when the value is written to."""
    if not isinstance(value, _CONTAINERS):
        return value
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return frozenset(value) if isinstance(value, set | frozenset) else tuple(_frozen(item) for item in value)


def _itself(value: Any) -> Any:
    return value


def _size(value: Any) -> Any:
    if isinstance(value, DTensor):  # whose part a graph reads where it lies
        return (value.dtype, tuple(value.shape), value.to_local().data_ptr())
    return (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else value


_SEEN_AS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("_modules", *_HOOKS), _itself),
    **dict.fromkeys(_TENSORS, _size),
}


def _is_same(now: Any, then: Any) -> bool:
    if now is then or type(now) is not type(then):
        return now is then
    if isinstance(then, tuple):
        return len(now) == len(then) and all(_is_same(a, b) for a, b in zip(now, then, strict=True))
    if isinstance(then, Tensor):
        return now.shape == then.shape and now.dtype == then.dtype and bool((now.cpu() == then.cpu()).all())
    return isinstance(then, _VALUES) and bool(now == then)


def _described(holder: _Holder, name: str, now: Any, then: Any) -> str:
    path, owner = f"{holder.path}.{name}".lstrip("."), holder.path or "the model"
    if holder.kind in _HOOKS:
        return f"a forward hook of {owner} was {'registered' if then is MISSING else 'removed'}"
    if name == "training":
        return f"{owner} was put into training mode"
    if name == "forward":
        return f"{path} was replaced"
    if now is MISSING or then is MISSING:
        return f"{path} was {'removed' if now is MISSING else 'added'}"
    if isinstance(now, tuple) and isinstance(then, tuple) and now[:2] == then[:2] and holder.kind in _TENSORS:
        return f"{path}, of which other processes have parts, was replaced or moved"
    if isinstance(then, nn.Module):
        return f"{path} was replaced, a {type(then).__name__} by a {type(now).__name__},"
    shown = all(value is None or isinstance(value, (*_VALUES, tuple)) for value in (now, then))
    return f"{path} was changed{f' from {then} to {now}' if shown else ''}"


def _error(change: str, is_twins: bool = False) -> InputError:
    again = "call kvmix_refresh() on the compiled model" if is_twins else "call kvmix_compile.apply again"
    return InputError(
        f"{change} after kvmix_compile.apply, whose graph does not follow that: undo it, or {again}, which captures "
        "the model as it is now"
    )
