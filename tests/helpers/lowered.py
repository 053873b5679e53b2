"""Graphs of Dynamo, in ATen as the backend sees them."""

from collections.abc import Callable
from typing import Any

import torch

from kvmix_compile.passes.capture.dynamo import Lowered, lower


def graphs_of(function: Callable[..., Any], calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Lowered]:
    """The graphs that Dynamo makes of these calls, lowered; they run as they are."""
    found = []

    def backend(module, inputs):
        found.append(lower(module, inputs))
        return module.forward

    compiled = torch.compile(function, backend=backend)
    with torch.no_grad():
        for args, kwargs in calls:
            compiled(*args, **kwargs)
    return found
