"""Interface: a twin's forward takes what the original's takes, by the same names and in the same order.

Whoever looks at a signature before a call, as transformers' generate and pipelines do, so does with a twin what it did
with the original.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

# What a twin computes whether the original takes it or not.
OWN = frozenset({"attention_mask", "labels", "use_cache", "logits_to_keep", "return_dict", "cache", "past_key_values"})


def with_signature_of(original: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, a method that takes keywords, as one that is called like the bound method `original`."""
    theirs = [
        parameter
        for parameter in inspect.signature(original).parameters.values()
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    names = [parameter.name for parameter in theirs]
    own = inspect.signature(forward).parameters
    this, *_, options = own.values()
    more = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.items()
        if name in OWN and name not in names
    ]

    @wraps(forward)
    def called(self: Any, *arguments: Any, **named: Any) -> Any:
        if len(arguments) > len(names) or not named.keys().isdisjoint(names[: len(arguments)]):
            signature.bind(self, *arguments, **named)  # says what is wrong, as Python does
        return forward(self, **dict(zip(names, arguments, strict=False)), **named)

    signature = inspect.Signature([this, *theirs, *more, options])
    called.__signature__ = signature  # type: ignore[attr-defined]
    return called
