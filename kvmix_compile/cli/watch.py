"""What the cache of a served model holds: that of the request in progress, or of the last one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, UNQUANTIZED_BITS
from kvmix_compile.kernels.format.state import packed_blocks
from kvmix_compile.passes.allocate.plan import SitePlan
from kvmix_compile.runtime.cache import KVMixCache
from kvmix_compile.runtime.generating import Request


@dataclass(frozen=True)
class LayerHeld:
    """What one attention site holds: code bits of its keys and values as planned, and the bits that an element takes
    now, unquantized ones and room to grow into counted.
    """

    layer: str
    key_bits: float
    value_bits: float
    held_bits: float


@dataclass(frozen=True)
class Held:
    """What a cache holds.

    tokens: of all rows, of which the first are `sinks`, `packed` are quantized and the last are `recent`.
    bytes: that it occupies. unquantized_bytes: of the same in 16 bits.
    bits: that an element takes, everything counted.
    """

    tokens: int
    sinks: int
    packed: int
    recent: int
    bytes: int
    unquantized_bytes: int
    bits: float
    layers: tuple[LayerHeld, ...]

    @classmethod
    def of(cls, cache: KVMixCache) -> Held:
        """What a cache holds now."""
        lengths, plan = cache.lengths.tolist(), cache.plan
        sinks = sum(min(length, plan.sinks) for length in lengths)
        packed = sum(BLOCK_TOKENS * packed_blocks(length, plan.sinks, plan.recent) for length in lengths)
        elements = [sum(site.visible_elements(length) for length in lengths) for site in plan.sites]
        occupied = [state.nbytes for state in cache.states] or [0] * len(plan.sites)
        return cls(
            tokens=sum(lengths),
            sinks=sinks,
            packed=packed,
            recent=sum(lengths) - sinks - packed,
            bytes=cache.nbytes,
            unquantized_bytes=sum(elements) * UNQUANTIZED_BITS // 8 + cache.carried_nbytes,
            bits=cache.bits_per_element,
            layers=tuple(map(_layer, plan.sites, occupied, elements)),
        )


def _layer(site: SitePlan, occupied: int, elements: int) -> LayerHeld:
    held = 8 * occupied / elements if elements else 0.0
    return LayerHeld(site.layer, site.key.mean_bits, site.value.mean_bits, held)


class Watched:
    """A compiled model that is generated from, by one at a time, and what its caches hold.

    model: answers as the model that was given, which stays as it was, and has its weights.
    """

    def __init__(self, model: Any) -> None:
        self._original = model
        self.model = copy.copy(model)
        self.model.generate = self._generate
        self._cache: KVMixCache | None = None
        self._last = Held.of(KVMixCache(model))

    @property
    def is_generating(self) -> bool:
        """Whether a request is in progress."""
        return self._cache is not None

    def held(self) -> Held:
        """Of the cache of the request in progress; else of that of the last one that was answered, when it ended."""
        cache = self._cache
        return self._last if cache is None else Held.of(cache)

    def _generate(self, inputs: Any = None, generation_config: Any = None, **options: Any) -> Any:
        own = getattr(self._original, "generation_config", None)
        request = Request(inputs, options, generation_config, own)
        if not request.caches:
            return self._original.generate(inputs, generation_config, **options)
        cache = self._cache = request.new_cache(self._original)
        try:
            return self._original.generate(inputs, generation_config, cache=cache, **options)
        finally:
            # The figures are kept, and the memory is not. A request that was refused has none.
            self._last, self._cache = Held.of(cache) if cache.seen else self._last, None
