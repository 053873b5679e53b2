"""Pickling: a compiled model is kept as its original, which is pickled as it always was, and its plan."""

from typing import Any

from torch import nn

from kvmix_compile.passes.plan import Plan

# What a compiled model gets anew: what `apply` gives it, and its own tree of modules.
_MADE_ANEW = frozenset({"kvmix_program", "kvmix_changes", "_modules", "_parameters", "_buffers"})


def attributes_of_its_own(twin: nn.Module, original: nn.Module) -> dict[str, Any]:
    """What was set on a compiled model since it was made, such as another generation_config. Hooks are copies."""
    shared = vars(original)
    return {
        name: value
        for name, value in vars(twin).items()
        if name not in _MADE_ANEW
        and not (name in shared and (value is shared[name] or ("_hooks" in name and value == shared[name])))
    }


def rebuild(original: nn.Module, plan: Plan, compile: bool) -> nn.Module:
    """The compiled model again: its graph is captured anew. It was verified when it was first made."""
    from kvmix_compile.compiler import apply

    return apply(original.eval(), plan=plan, compile=compile, verify=False)
