"""Signature: what a callable takes by name. Whatever depends on the spelling of a model's interface asks here."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

# What transformers calls a KV cache, since 5.24 and before.
CACHE_NAMES = ("cache", "past_key_values")


def parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of its parameters, in order, whatever decorates it."""
    return tuple(inspect.signature(function).parameters)


def caching(function: Callable[..., Any], on: bool) -> dict[str, bool]:
    """The argument that turns a model's cache on or off, where its forward takes one, be it among others that it hands
    on.
    """
    parameters = inspect.signature(function).parameters
    takes_more = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"use_cache": on} if takes_more or "use_cache" in parameters else {}


def cache_name(function: Callable[..., Any]) -> str:
    """The name by which it takes a KV cache; where it takes none by name, the one that is in use today."""
    return _first_of(CACHE_NAMES, parameters_of(function)) or CACHE_NAMES[0]


def cache_in(output: object) -> Any:
    """The KV cache that a model returned with its logits, None where there is none."""
    held = getattr(output, "__dict__", {})
    name = _first_of(CACHE_NAMES, [name for name in held if held[name] is not None])
    return held[name] if name else None


def _first_of(names: Iterable[str], there: Iterable[str]) -> str | None:
    known = set(there)
    return next((name for name in names if name in known), None)
