"""Engine caches: keys and values as a serving engine keeps them by an engine plan, read through a transformers cache.

Every token is rounded as it is written, and reads itself from there, as engines have it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kvmix_compile.engines.plan import EngineLayer, EnginePlan
from kvmix_compile.evaluate.configurations import Configuration

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EngineCached(Configuration):
    """A transformers model that keeps its cache by a plan, with scales of 1. Its layers are the plan's, in order."""

    plan: EnginePlan

    @property
    def code_bits(self) -> float:
        return self.plan.code_bits

    @property
    def stored_bits(self) -> float:
        return self.plan.stored_bits

    def new_cache(self) -> Cache:
        return Cache(layers=[_layer(layer) for layer in self.plan.layers])

    def held_bits(self, cache: Cache) -> float:
        return self.plan.stored_bits


class RoundedLayer(DynamicLayer):
    """One layer's keys and values `[rows, heads, tokens, dim]`, as they are read back."""

    def __init__(self, keys: Rounding, values: Rounding) -> None:
        super().__init__()
        self.rounding = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers calls it: new keys and values come, and all are returned."""
        keys, values = self.rounding
        stored = keys(key_states.float()).to(key_states), values(value_states.float()).to(value_states)
        return super().update(*stored, *args, **kwargs)


def _layer(layer: EngineLayer) -> DynamicLayer:
    if layer.kept is None:
        return DynamicLayer()
    return RoundedLayer(layer.kept.key.as_stored, layer.kept.value.as_stored)
