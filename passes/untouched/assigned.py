"""Assigned: the attributes that a model's own code writes after it was made: they are its state, and no settings.

A forward that is seen to write to one has it among what it changes. Others are written for some inputs alone, such as
how far images moved the positions of the text behind them.
"""

import dis
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType

from torch import nn

from kvmix_compile.passes.untouched.reach import is_anothers

# What makes an object or is there for a user to change it with.
_SETTING_UP = ("__init__", "__setattr__", "__setstate__", "_init_weights", "post_init")
_SETTERS = ("set_", "enable_", "disable_", "resize_")


def assigned_names(model: nn.Module) -> frozenset[str]:
    """The names of attributes that a method of some module's class assigns, those that set it up left out."""
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    return frozenset[str]().union(*(_assigned_by(kind) for kind in kinds))


@cache
def _assigned_by(kind: type) -> frozenset[str]:
    if is_anothers(kind.__module__):
        return frozenset()
    methods = {name: method for name, method in vars(kind).items() if not name.startswith(_SETTERS)}
    return frozenset(
        assigned
        for name, method in methods.items()
        if name not in _SETTING_UP
        for assigned in _stores(getattr(_unwrapped(method), "__code__", None))
    )


def _unwrapped(method: object) -> object:
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return method if isinstance(method, FunctionType) else getattr(method, "__func__", None)


def _stores(code: CodeType | None) -> Iterator[str]:
    if code is not None:
        yield from (step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR")
