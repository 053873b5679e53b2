"""Equality: options with tensors in them are compared like options with lists.

PyTorch and transformers ask whether two compiled functions have equal options, with `==`, to which tensors have no
single answer. Once this backend is imported they ask here where the options are this backend's.
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import CompileConfig

from kvmix_compile.backend.calls import is_ours


def same(one: object, other: object) -> bool:
    """Whether two options, or parts of them, are equal; never raises."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and _content(one) == _content(other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor | np.ndarray) or isinstance(other, Tensor | np.ndarray):
        return False
    try:
        return bool(one == other)
    except Exception:  # What cannot be compared is not the same.
        return False


# Read off the device once, as Dynamo may compare in every step.
_contents = WeakTensorKeyDictionary()


def _content(tensor: Tensor) -> list[Any]:
    version = None if tensor.is_inference() else tensor._version
    known = _contents.get(tensor)
    if known is None or known[0] != version:
        known = _contents[tensor] = (version, tensor.tolist())
    return known[1]


_wrappers_equal = torch._TorchCompileWrapper.__eq__
_configs_equal = CompileConfig.__eq__


@wraps(_wrappers_equal)
def _equal_wrappers(one: Any, other: object) -> bool:
    """Of two equal ones Dynamo lets either call what was compiled for the other. What was planned for one model is not
    for another, so without a plan only the very same are equal.
    """
    if not (isinstance(other, type(one)) and is_ours(one) and is_ours(other)):
        return _wrappers_equal(one, other)
    has_plan = one.kwargs.get("options", {}).get("plan") is not None
    return one is other or (has_plan and one.dynamic == other.dynamic and same(one.kwargs, other.kwargs))


@wraps(_configs_equal)
def _equal_configs(one: Any, other: object) -> bool:
    if not (isinstance(other, type(one)) and is_ours(one.backend)):
        return _configs_equal(one, other)
    return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))


torch._TorchCompileWrapper.__eq__ = _equal_wrappers  # type: ignore[method-assign]
CompileConfig.__eq__ = _equal_configs  # type: ignore[method-assign]
