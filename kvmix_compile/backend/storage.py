"""Storage: a StaticCache's buffers are released, and a packed cache belongs to them instead.

A buffer that was released has the same shape, over a few elements that are not numbers and that all buffers share, so
that whoever reads it by mistake sees it. The packed cache lives as long as the buffers do.
"""

import os
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import Cache

from kvmix_compile.errors import CacheError
from kvmix_compile.runtime.cache import KVMixCache
from kvmix_compile.runtime.cache_format import CacheFormat


class PackedCache(KVMixCache):
    """What belongs to one StaticCache: a KVMixCache, and what the host knows of it without asking the device.

    counters: the versions of the StaticCache's own counters when it was last seen; while they stay, so does `seen`.
    """

    def __init__(self, cache_format: CacheFormat) -> None:
        super().__init__(cache_format)
        self.counters: tuple[int, ...] | None = None

    def reset(self) -> None:
        super().reset()
        self.counters = None

    def save(self, path: str | os.PathLike[str]) -> None:
        raise CacheError(
            "what a StaticCache holds packed cannot be saved, as it is of no use without the StaticCache: a model "
            "compiled by kvmix_compile.apply has caches that can"
        )

    def reorder_site(self, site: int, rows: Tensor) -> None:
        """Row i of one site becomes what row `rows[i]` was. To be done for every site."""
        rows = rows.to(self.lengths.device)
        self.states[site].select_rows(rows)
        if site == 0:
            self.lengths = self.lengths[rows]


@dataclass(frozen=True)
class PackedSite:
    """Where the keys and values of a layer are kept: site `site` of a packed cache."""

    cache: PackedCache
    site: int


_packed_sites = WeakTensorKeyDictionary()

# Every step in any direction leads to the next element: little memory for any shape, and PyTorch lets Dynamo trace
# writes to it, which it does not with strides of zero.
_STRIDES = (1, 1, 1, 1)


def packed_site_of(buffer: Tensor) -> PackedSite | None:
    """Where what this buffer held is kept now, if it was released."""
    packed_site = _packed_sites.get(buffer)
    if packed_site is None and is_released(buffer):
        raise CacheError(
            "this StaticCache is a copy of one whose keys and values are kept packed, and copies do not have them: "
            "begin with a new StaticCache"
        )
    return packed_site


def is_released(buffer: object) -> bool:
    """Whether the buffer has no storage of its own."""
    return isinstance(buffer, Tensor) and buffer.stride() == _STRIDES


def released(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, site: PackedSite) -> Tensor:
    """A new buffer that never had a storage of its own."""
    buffer = _without_storage(shape, dtype, device)
    _packed_sites[buffer] = site
    return buffer


def without_storage(like: Tensor) -> Tensor:
    """What a buffer looks like when it was released."""
    return _without_storage(tuple(like.shape), like.dtype, like.device)


@torch.no_grad()
def _without_storage(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # No view: autograd would not let one be written to that was made without gradients.
    return torch.empty(0, dtype=dtype, device=device).set_(_few_elements(shape, dtype, device), 0, shape, _STRIDES)


def belongs_to(buffer: Tensor, site: PackedSite) -> None:
    """What the buffer held is kept there from now on."""
    _packed_sites[buffer] = site


@torch.no_grad()
def release(buffer: Tensor, site: PackedSite) -> None:
    """Free a buffer's storage, in place."""
    storage = _few_elements(tuple(buffer.shape), buffer.dtype, buffer.device)
    buffer.set_(storage, 0, buffer.shape, _STRIDES)
    # What transformers marks with a fixed address is compiled for that one tensor.
    buffer.__dict__.pop("_dynamo_static_input_type", None)
    _packed_sites[buffer] = site


def packed_cache(cache: Cache) -> PackedCache | None:
    """What the compiled graphs keep of a StaticCache, to look at: `nbytes`, `bits_per_element`, `lengths`.

    None as long as nothing was written to it.
    """
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and (packed_site := packed_site_of(keys)) is not None:
            return packed_site.cache
    return None


@lru_cache
def _few_elements(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.UntypedStorage:
    """One for all buffers of a shape, as nobody writes to it."""
    return torch.full((sum(shape) - len(shape) + 1,), torch.nan, dtype=dtype, device=device).untyped_storage()
