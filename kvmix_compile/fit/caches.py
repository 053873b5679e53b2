"""Caches: what a row of so many tokens takes in the cache of a sketched model, stored in one way or another."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log2

import torch

from kvmix_compile.config import RECENT_WINDOWS
from kvmix_compile.fit.sketch import Sketch, SketchedSite
from kvmix_compile.kernels.format.precision import Axis, Precision
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.allocate.policies import SiteImportance
from kvmix_compile.passes.capture.export import UNLIMITED
from kvmix_compile.passes.measure.importance import Importance
from kvmix_compile.passes.measure.sensitivity import candidates_for


@dataclass(frozen=True)
class CacheKind:
    """A way of storing a cache. stored_bits: of an element, scales and zero points included. row_bytes: of a row, by
    its tokens; as many rows take as many times that.
    """

    name: str
    stored_bits: float
    row_bytes: Callable[[int], int]


def unquantized(name: str, sketch: Sketch, itemsize: int | None = None) -> CacheKind:
    """The model's own cache (transformers' DynamicCache), in the dtypes of its keys and values, or of `itemsize` bytes
    an element without scales. A sliding window keeps what it shows to the next token.
    """
    sizes = [site.dtype.itemsize if itemsize is None else itemsize for site in sketch.sites]

    def row_bytes(tokens: int) -> int:
        held = sum(site.visible_elements(tokens) * size for site, size in zip(sketch.sites, sizes, strict=True))
        return held + _carried(sketch)

    return CacheKind(name, 8 * max(sizes), row_bytes)


def compressed(name: str, sketch: Sketch, plan: Plan, begins_whole: bool = True) -> CacheKind:
    """A KVMixCache with this plan, room to grow into included. begins_whole: as on a GPU (Plan.cache_bytes)."""
    layouts = plan.layouts()

    def row_bytes(tokens: int) -> int:
        states = sum(
            layout.bytes(1, layout.room(tokens, begins_whole), layout.unquantized_dtype(site.dtype))
            for layout, site in zip(layouts, sketch.sites, strict=True)
        )
        # And how many tokens the row holds.
        return states + torch.int64.itemsize + _carried(sketch)

    return CacheKind(name, plan.storage_bits, row_bytes)


def plan_on_paper(sketch: Sketch, budget: float, context: int) -> Plan:
    """What `apply` would make of a budget of code bits for texts of so many tokens if all layers mattered alike.

    Raises BudgetError where it cannot be met.
    """
    sinks, recent = RECENT_WINDOWS["fixed"]
    sites = tuple(map(_alike, sketch.sites))
    return Importance(sites, "", sinks, recent, tokens=0, loss=0.0).allocate(budget=budget, context=context)


def _alike(site: SketchedSite) -> SiteImportance:
    return SiteImportance(
        layer=site.layer,
        shape=site.shape,
        key_gradient_norm=0.0,
        value_gradient_norm=0.0,
        key_sensitivity=_losses(candidates_for(site.key_dim, Axis.TOKENS)),
        value_sensitivity=_losses(candidates_for(site.value_dim, Axis.CHANNELS)),
    )


def _losses(candidates: tuple[Precision, ...]) -> Mapping[Precision, float]:
    """What rounding loses of elements that are distributed normally: a bit more is half the step, and the range of a
    group grows with the root of the logarithm of its size.
    """
    return {precision: log2(precision.group) / 4**precision.bits for precision in candidates}


def _carried(sketch: Sketch) -> int:
    return sum(state.row_bytes for state in sketch.carried)


def longest_context(kind: CacheKind, memory: int, rows: int) -> int | None:
    """The most tokens in each of so many rows in so many bytes; None: any number, as where all attention is to sliding
    windows.
    """
    # Row bytes never fall as tokens are added.
    tokens = bisect_right(range(UNLIMITED), memory // rows, key=kind.row_bytes) - 1
    return None if tokens == UNLIMITED - 1 else max(0, tokens)
