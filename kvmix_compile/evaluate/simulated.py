"""Simulated caches: how others store keys and values, in PyTorch and at no cost in bits, read through a cache.

A transformers cache whose tokens are replaced by what a quantizer makes of them once they have left the recent window.
It has the same attention sinks and recent tokens as this project's own cache, so that quantizers alone are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kvmix_compile.evaluate.configurations import Configuration
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, UNQUANTIZED_BITS

# Keys or values, float32 [rows, heads, tokens, dim], as they are read back.
Quantizer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stored:
    """How one layer stores its keys, or its values. bits, stored_bits: of an element, the latter with scales and all
    that is stored beside the codes.
    """

    quantizer: Quantizer
    bits: float
    stored_bits: float


@dataclass(frozen=True)
class Simulated(Configuration):
    """A transformers model with a simulated cache.

    keys, values: of each layer. tile: tokens that are quantized together.
    sinks, recent: tokens that are not; while a tile is being filled, up to tile - 32 more.
    """

    keys: Sequence[Stored]
    values: Sequence[Stored]
    tile: int
    sinks: int
    recent: int

    @property
    def code_bits(self) -> float:
        return _mean([stored.bits for stored in (*self.keys, *self.values)])

    @property
    def stored_bits(self) -> float:
        return _mean([stored.stored_bits for stored in (*self.keys, *self.values)])

    @property
    def unquantized_tokens(self) -> int:
        return self.sinks + self.recent + self.tile - BLOCK_TOKENS

    def new_cache(self) -> Cache:
        return Cache(
            layers=[
                SimulatedLayer(key.quantizer, value.quantizer, self.tile, self.sinks, self.recent)
                for key, value in zip(self.keys, self.values, strict=True)
            ]
        )

    def held_bits(self, cache: Cache) -> float:
        tokens, layers = cache.get_seq_length(), cast(list[SimulatedLayer], cache.layers)
        stored = _mean([layer.stored for layer in layers])
        return (stored * self.stored_bits + (tokens - stored) * UNQUANTIZED_BITS) / tokens


class SimulatedLayer(DynamicLayer):
    """One layer's keys and values `[rows, heads, tokens, dim]`, those that are recent no more as they are read back.

    stored: how many tokens are.
    """

    is_croppable = False

    def __init__(self, keys: Quantizer, values: Quantizer, tile: int, sinks: int, recent: int) -> None:
        super().__init__()
        self.quantizers, self.tile, self.sinks, self.recent = (keys, values), tile, sinks, recent
        self.stored = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers calls it: new keys and values come, and all are returned."""
        # Only now: what was returned before may still be read.
        if self.is_initialized:
            self._store()
        return super().update(key_states, value_states, *args, **kwargs)

    @torch.no_grad()
    def _store(self) -> None:
        first, length = self.sinks + self.stored, self.get_seq_length()
        # As kernels.format.state.packed_blocks where a tile is a block: recent - 31 to recent tokens wait.
        tiles = (length - first - (self.recent - BLOCK_TOKENS + 1)) // self.tile
        for begin in range(first, first + max(0, tiles) * self.tile, self.tile):
            for held, quantizer in zip((self.keys, self.values), self.quantizers, strict=True):
                assert held is not None
                of_tile = held[:, :, begin : begin + self.tile]
                of_tile.copy_(quantizer(of_tile.float()))
            self.stored += self.tile


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
