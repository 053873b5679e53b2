"""Layers: what transformers' static layers do differently once this backend is imported.

Dynamo guards on a tensor's strides, and a buffer that is released changes its own. So that no graph is compiled
twice, this backend's graphs take *stand-ins* in place of buffers that were made outside of a graph: they look from
the beginning as the buffers will when they are released. Where Dynamo traces for this backend, a layer swaps its
buffers for their stand-ins; anywhere else it keeps its buffers, and its methods do what they did.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from kvmix_compile.backend.calls import called_to_be_packed, traced_to_be_packed
from kvmix_compile.backend.storage import is_released, packed_site_of, without_storage
from kvmix_compile.errors import CacheError

Side = Literal["keys", "values"]


@dataclass(frozen=True)
class _Behind:
    layer: "weakref.ref[StaticLayer]"
    side: Side


# Of each stand-in the layer that it belongs to.
_behind = WeakTensorKeyDictionary()


class StandIns:
    """The stand-ins of one layer. A copy of the layer has its own."""

    def __init__(self, layer: StaticLayer, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = without_storage(keys), without_storage(values)
        for side in ("keys", "values"):
            _behind[getattr(self, side)] = _Behind(weakref.ref(layer), side)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StandIns | None":
        layer = _behind[self.keys].layer()
        copied = None if layer is None else memo.get(id(layer))
        return None if copied is None else StandIns(copied, self.keys, self.values)

    def __reduce__(self) -> tuple[Any, ...]:
        """Saved as None: a layer without stand-ins is compiled with its buffers."""
        return type(None), ()


def buffer_behind(tensor: Tensor) -> Tensor:
    """The buffer that a graph was given, `tensor` itself or the one that it stands in for.

    Raises CacheError where that was replaced by one of another shape.
    """
    behind = _behind.get(tensor)
    if behind is None:
        return tensor
    layer = behind.layer()
    buffer = None if layer is None else getattr(layer, behind.side)
    if not isinstance(buffer, Tensor) or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        raise CacheError(
            "the keys and values of this StaticCache were replaced from outside: begin with a new one, or call its "
            "reset()"
        )
    return buffer


_lazy_initialization, _reset, _reorder_cache = (
    StaticLayer.lazy_initialization, StaticLayer.reset, StaticLayer.reorder_cache,
)  # fmt: skip


@wraps(_lazy_initialization)
def _initialize_with_stand_ins(layer: Any, key_states: Tensor, value_states: Tensor) -> None:
    _lazy_initialization(layer, key_states, value_states)
    # What is made in a graph is made without a storage; and what is no ordinary tensor is left alone.
    if not torch.compiler.is_compiling() and type(layer.keys) is Tensor and layer.keys.is_floating_point():
        layer.kvmix_stand_ins = StandIns(layer, layer.keys, layer.values)


def _reset_packed(layer: Any) -> None:
    """A layer that was released is as good as new: the next tokens make its buffers again."""
    if is_released(layer.keys):
        layer.keys = layer.values = layer.kvmix_stand_ins = None
        layer.is_initialized = False
    _reset(layer)


def _reorder_packed(layer: Any, beam_idx: torch.LongTensor) -> None:
    packed_site = packed_site_of(layer.keys) if isinstance(layer.keys, Tensor) else None
    if packed_site is not None:
        packed_site.cache.reorder_site(packed_site.site, beam_idx)
        return
    _reorder_cache(layer, beam_idx)
    if layer.kvmix_stand_ins is not None and layer.keys.shape != layer.kvmix_stand_ins.keys.shape:
        layer.kvmix_stand_ins = StandIns(layer, layer.keys, layer.values)


def _as_traced_or_refused(update: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(update)
    def checked(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            _check_may_be_written(layer)
        elif layer.kvmix_stand_ins is not None and traced_to_be_packed():
            layer.keys, layer.values = layer.kvmix_stand_ins.keys, layer.kvmix_stand_ins.values
        return update(layer, *args, **kwargs)

    return checked


def _check_may_be_written(layer: StaticLayer) -> None:
    """Outside of the compiled graphs nobody can write to a layer that was released, and a model that was compiled to
    pack its cache does not fill one with 16 bits.
    """
    if is_released(layer.keys):
        raise CacheError(
            "this StaticCache is kept packed by a model compiled with backend 'kvmix', and the model was now called "
            f"without being compiled: call the compiled model, or the cache's reset() first; {GAVE_UP}"
        )
    if (call := called_to_be_packed()) is not None:
        raise CacheError(
            f"{call.name} is compiled with backend 'kvmix', and Dynamo runs it, or the part of it that writes to its "
            f"StaticCache, without compiling it, so that nothing would be packed: {GAVE_UP}"
        )


GAVE_UP = (
    "where Dynamo gave up after torch._dynamo.config.recompile_limit recompilations, raise that limit or call "
    "torch._dynamo.reset(); TORCH_LOGS=recompiles,graph_breaks says what it did"
)

StaticLayer.kvmix_stand_ins = None  # type: ignore[attr-defined]
StaticLayer.lazy_initialization = _initialize_with_stand_ins  # type: ignore[assignment, method-assign]
StaticLayer.reset = _reset_packed  # type: ignore[assignment, method-assign]
StaticLayer.reorder_cache = _reorder_packed  # type: ignore[assignment, method-assign]
for _layer in (StaticLayer, StaticSlidingWindowLayer):
    _layer.update = _as_traced_or_refused(_layer.update)  # type: ignore[method-assign]
