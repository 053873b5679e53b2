"""Left: what of a model this backend leaves as it is. It says so, once of each model, or refuses."""

import warnings
from collections.abc import Sequence
from weakref import WeakSet

from torch import fx

from kvmix_compile.backend.calls import compiled_call
from kvmix_compile.backend.plan import BROKEN_GRAPH
from kvmix_compile.backend.storage import is_released
from kvmix_compile.errors import UnsupportedModelError
from kvmix_compile.passes.capture.dynamo import Lowered
from kvmix_compile.passes.graph.vocabulary import graph_inputs, operation, tensor_of
from kvmix_compile.passes.match.sites import ATTENTION, module_path
from kvmix_compile.passes.match.static_cache import CachedSite


def check_left(lowered: Lowered, sites: Sequence[CachedSite]) -> None:
    """Raises UnsupportedModelError where the graph reads or writes a buffer that is packed, and no site is there to do
    it.
    """
    replaced = {buffer.tensor for cached in sites for buffer in (cached.key, cached.value)}
    for node, value in zip(graph_inputs(lowered.graph), lowered.inputs, strict=True):
        if node.users and node not in replaced and is_released(value):
            raise UnsupportedModelError(
                f"{module_path(next(iter(node.users)))}: the keys or values of a StaticCache are used without the "
                f"attention to them, which cannot be done with packed ones; {BROKEN_GRAPH}"
            )


_said: WeakSet[object] = WeakSet()


def say_what_is_left(lowered: Lowered) -> None:
    """Warn, once of a model, that a graph attends to no cache. Graphs without attention have nothing to be packed."""
    call = compiled_call()
    if call is None or call.called in _said or not any(map(_attends, lowered.graph.nodes)):
        return
    _said.add(call.called)
    warnings.warn(
        f"backend 'kvmix' was given a graph of {call.name} that attends with no KV cache in it, and left it as it is: "
        "it compresses a transformers.StaticCache that the model is called with, or "
        "generate(.., cache_implementation='static')",
        stacklevel=2,
    )


def _attends(node: fx.Node) -> bool:
    """A softmax of rows of scores is attention; one of a row alone chooses among experts."""
    value = tensor_of(node)
    return operation(node) == ATTENTION or (operation(node) == "softmax" and value is not None and value.dim() > 2)
