"""Refresh: a compiled model is captured anew as it is now, in place: with adapters that were loaded into it, say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from kvmix_compile.config import Config
from kvmix_compile.passes.untouched.reach import held_by, hold

# What makes a module a compiled model, besides its class.
_COMPILED = ("kvmix_program", "kvmix_changes", "kvmix_own_forward")


def refresh(twin: Any, original: type[nn.Module], *, verify: bool) -> None:
    """Compile `twin`, whose class was `original` before, anew by its own plan. What fails leaves it as it was.

    Raises what `kvmix_compile.apply` raises.
    """
    from kvmix_compile.compiler import apply_in_place

    program = twin.kvmix_program
    with _as_before_it_was_compiled(twin, original):
        apply_in_place(twin, Config(plan=program.plan).checked(), compile=program.inductor is not None, verify=verify)


@contextmanager
def _as_before_it_was_compiled(twin: Any, original: type[nn.Module]) -> Iterator[None]:
    """Around what compiles it: without what makes it a compiled model, and without the hooks that run around its graph,
    which come back.
    """
    attributes = vars(twin)
    compiled, kept = type(twin), {name: attributes.pop(name) for name in _COMPILED}
    hooks = {name: (held, held_by(held)) for name, held in attributes.items() if name.startswith("_forward_")}
    for held, _ in hooks.values():
        held.clear()
    if kept["kvmix_own_forward"] is not None:
        attributes["forward"] = kept["kvmix_own_forward"]
    twin.__class__ = original
    try:
        yield
    except BaseException:
        twin.__class__ = compiled
        attributes.pop("forward", None)
        attributes.update(kept)
        raise
    finally:
        for name, (held, content) in hooks.items():
            hold(held, content)  # the same dictionary, from which whoever registered a hook removes it
            attributes[name] = held
