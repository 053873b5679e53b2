"""Pickling: a compiled model is kept as its original, which is pickled as it always was, and its plan."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from kvmix_compile.passes.allocate.plan import Plan

# What a compiled model gets anew: what `apply` gives it, and its own tree of modules.
_MADE_ANEW = frozenset({"kvmix_program", "kvmix_changes", "kvmix_own_forward", "_modules", "_parameters", "_buffers"})

# What a twin has its own of, so that what is set there is not set for the original; its submodules hold the same ones.
OWN_SETTINGS = frozenset({"config", "generation_config"})


def attributes_of_its_own(twin: nn.Module, original: nn.Module) -> dict[str, Any]:
    """What was set on a compiled model since it was made, such as another generation_config. Hooks are copies."""
    shared = vars(original)
    return {
        name: value
        for name, value in vars(twin).items()
        if name not in _MADE_ANEW | OWN_SETTINGS
        and not (name in shared and (value is shared[name] or ("_hooks" in name and value == shared[name])))
    }


def settings_of(twin: nn.Module) -> dict[str, Any]:
    """The configurations of a compiled model."""
    return {name: vars(twin)[name] for name in OWN_SETTINGS & vars(twin).keys()}


def give_settings(twin: nn.Module, settings: Mapping[str, Any]) -> None:
    """Make a compiled model's configurations what these are, in place."""
    for name in settings.keys() & vars(twin).keys():
        vars(vars(twin)[name]).update(vars(settings[name]))


def rebuild(original: nn.Module, plan: Plan, compile: bool, settings: Mapping[str, Any]) -> nn.Module:
    """The compiled model again: its graph is captured anew. It was verified when it was first made."""
    from kvmix_compile.compiler import apply

    twin = apply(original.eval(), plan=plan, compile=compile, verify=False)
    give_settings(twin, settings)
    return twin
