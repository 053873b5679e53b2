"""Module tree: a twin has modules of its own, over the parameters and buffers of the original.

So what is done to a twin's modules (an adapter put on, a hook registered, a config changed) is not done to the
original's, while a weight that is loaded, trained or replaced in one is there in both.
"""

import copy
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

# Dictionaries of a module that both have: what is put into one is read by the other.
_SHARED = frozenset({"_parameters", "_buffers", "_non_persistent_buffers_set"})


def module_tree(model: nn.Module) -> nn.Module:
    """A copy of `model` and of every module in it, with the same parameters and buffers; its own attributes,
    containers of attributes, hooks and configs.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        # A scripted module is an object of C++, which cannot be taken apart.
        is_scripted = isinstance(module, torch.jit.ScriptModule)
        copies[id(module)] = module if is_scripted else object.__new__(type(module))
    for module in model.modules():
        if copies[id(module)] is not module:
            copies[id(module)].__dict__.update(
                {name: held if name in _SHARED else _own(held, copies) for name, held in vars(module).items()}
            )
    return copies[id(model)]


def _own(value: Any, copies: dict[int, Any]) -> Any:
    """What a module's copy has in the place of a value. `copies`: by identity, so that what is one stays one."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, PreTrainedConfig | GenerationConfig):
        return copy.deepcopy(value, copies)
    if isinstance(value, MethodType) and id(value.__self__) in copies:
        return MethodType(value.__func__, copies[id(value.__self__)])
    if isinstance(value, partial):  # as the forward of a module that accelerate has hooked
        call = partial(value.func, *_own(value.args, copies), **_own(value.keywords, copies))
        vars(call).update(vars(value))
        return call
    if isinstance(value, dict):
        own: Any = copy.copy(value)
        for key, item in value.items():
            own[key] = _own(item, copies)
    elif type(value) in (list, tuple, set):
        own = type(value)(_own(item, copies) for item in value)
    else:
        return value
    copies[id(value)] = own
    return own
