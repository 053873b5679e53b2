"""Digest: what tells a model from every other whose graph may be another: the code of its forward and all that it
reaches, its settings, and its weights.

What `reach` finds is told apart from one process to the next: code by its instructions, settings by their values,
tensors by their elements (large ones by some of them), and everything else by its class.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from kvmix_compile.passes.untouched.reach import (
    MISSING,
    Container,
    Names,
    attribute,
    attributes,
    content,
    held_by,
    reach,
)

# Tensors of up to so many bytes are told apart by all of their elements: what constants of a graph are worked out from.
SMALL = 2**20
# Elements by which larger ones are told apart.
SAMPLED_ELEMENTS = 64

# Containers in each other that are looked into; transformers' registries refer to each other.
DEPTH = 4

_PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, torch.Size)


def digest(model: nn.Module) -> str | None:
    """The same in every process for models whose forwards do the same with the same weights; None where it cannot be
    told, because weights are stored as something else than their elements.
    """
    told = hashlib.sha256()
    for tensor in _tensors(model):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type == "meta":
            return None
    for line in sorted(set(_lines(model))):
        told.update(f"{line}\n".encode())
    return told.hexdigest()


def sampled(tensor: Tensor, most: int = SAMPLED_ELEMENTS) -> memoryview:
    """The bytes of at most so many of the elements of a tensor that has any, evenly apart, wherever it is."""
    elements = tensor.detach().reshape(-1)
    return elements[:: -(-len(elements) // most)].cpu().contiguous().view(torch.uint8).numpy().data


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from (held for held in (*module._parameters.values(), *module._buffers.values()) if held is not None)


def _lines(model: nn.Module) -> Iterator[str]:
    """What the digest is of, in any order."""
    found, paths = reach(model), {id(module): path for path, module in model.named_modules()}
    for owner in found.objects:
        if isinstance(owner, GenerationConfig):  # no forward's: its hash of itself is another in every process
            continue
        label = f"{paths.get(id(owner), '')} {_name(owner)}"
        if isinstance(owner, FunctionType):
            yield f"{label} {_function(owner, DEPTH)}"
        for name, value in (attributes(owner) or {}).items():
            yield f"{label}.{name} = {_told(value)}"
    for owner, name in found.slots:
        yield f"{_name(owner)}.{name} = {_told(attribute(owner, name))}"
    for names in found.namespaces:
        yield from _of_namespace(names)
    for cell in found.cells:
        yield f"closed over: {_told(content(cell))}"


def _of_namespace(names: Names) -> Iterator[str]:
    owner = names.owner
    label = _name(owner) if isinstance(owner, type) else owner.get("__name__")
    for name, value in names.values.items():
        # Python's own notes of a class or file are no code: paths, documentation, what pickling found.
        if value is MISSING or (name.startswith("__") and not callable(value)):
            continue
        # Tables of a file are looked up in, and may be made in the order of a set, another in every process.
        yield f"{label}.{name} = {_listed(sorted(_entries(value, DEPTH))) if isinstance(value, dict) else _told(value)}"


def _told(value: Any, depth: int = DEPTH) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, type | BuiltinFunctionType | nn.Module):
        return _name(value)
    if isinstance(value, ModuleType):
        return value.__name__
    if not depth:
        return "..."
    if isinstance(value, FunctionType):
        return _function(value, depth)
    if isinstance(value, MethodType):
        return f"{_name(value.__self__)} {_told(value.__func__, depth - 1)}"
    if isinstance(value, staticmethod | classmethod):
        return _told(value.__func__, depth - 1)
    if isinstance(value, property):
        return _told((value.fget, value.fset), depth - 1)
    if isinstance(value, functools.partial):
        return _told((value.func, value.args, value.keywords), depth - 1)
    if isinstance(value, dict):
        return _listed(_entries(value, depth))
    if isinstance(value, set | frozenset):
        return _listed(sorted(_told(held, depth - 1) for held in value))
    if isinstance(value, Container | tuple):
        return _listed(_told(held, depth - 1) for held in value)
    return _name(value)


def _entries(table: dict[Any, Any], depth: int) -> Iterator[str]:
    return (f"{_told(key, depth - 1)}: {_told(held, depth - 1)}" for key, held in held_by(table).items())


def _listed(told: Iterable[str]) -> str:
    return f"[{', '.join(told)}]"


def _name(value: Any) -> str:
    """Of a class or function, or of the class of an object."""
    named = value if isinstance(value, type | FunctionType | BuiltinFunctionType) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _function(function: FunctionType, depth: int) -> str:
    defaults = _told((function.__defaults__, function.__kwdefaults__), depth - 1)
    return f"{_name(function)} {_code(function.__code__)} {defaults}"


@functools.lru_cache(maxsize=4096)
def _code(code: CodeType) -> str:
    constants = [_code(held) if isinstance(held, CodeType) else _told(held) for held in code.co_consts]
    told = (code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars, code.co_flags)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _of_tensor(tensor: Tensor) -> str:
    told = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.device}"
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return told
    held = sampled(tensor, tensor.numel() if tensor.nbytes <= SMALL else SAMPLED_ELEMENTS)
    return f"{told} {tensor.stride()} {hashlib.sha256(held).hexdigest()}"
