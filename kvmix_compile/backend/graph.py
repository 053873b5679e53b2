"""Graph: one of Dynamo's graphs with its cache packed, as it is called in the place of the original."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx

from kvmix_compile.backend.counting import Counter
from kvmix_compile.backend.layers import buffer_behind
from kvmix_compile.backend.padding import MaskReader, padding
from kvmix_compile.backend.storage import PackedCache, PackedSite, belongs_to, packed_site_of, release, released
from kvmix_compile.errors import CacheError
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.capture.dynamo import Lowered
from kvmix_compile.passes.capture.sizes import Size, size_reader
from kvmix_compile.passes.graph.vocabulary import graph_inputs
from kvmix_compile.passes.match.static_cache import Buffer, CachedSite
from kvmix_compile.passes.rewrite.static import rewrite_static
from kvmix_compile.passes.rewrite.stored_form import append_to
from kvmix_compile.runtime.cache_format import CacheFormat
from kvmix_compile.runtime.inductor import own_compiled_code, symbolic_sizes
from kvmix_compile.runtime.padding import looks_at_masks

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Sequence[Any]]]

# How many packed blocks the graph is traced with, and of each window one more: numbers like no other size. It holds for
# any.
TRACED_BLOCKS = 1009


@dataclass(frozen=True)
class _BufferSource:
    """Where a buffer comes from when the graph is called: an input, or (None) the graph itself; and its sizes."""

    source: int | None
    shape: tuple[Size, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, buffer: Buffer, lowered: Lowered) -> Self:
        value = buffer.tensor.meta["val"]
        source = graph_inputs(lowered.graph).index(buffer.tensor) if buffer.is_input else None
        return cls(source, tuple(size_reader(size, lowered) for size in value.shape), value.dtype)


@dataclass(frozen=True)
class _SiteSource:
    """What is left to know of a site when its graph is called. `whole`: its attention is to the new tokens alone."""

    layer: str
    is_indexed: bool
    whole: bool
    key: _BufferSource
    value: _BufferSource

    @classmethod
    def of(cls, cached: CachedSite, lowered: Lowered) -> Self:
        key, value = _BufferSource.of(cached.key, lowered), _BufferSource.of(cached.value, lowered)
        is_indexed = cached.key.form == "indexed"
        return cls(cached.site.layer, is_indexed, is_indexed and cached.mask is None, key, value)


class StaticGraph:
    """One of Dynamo's graphs, compiled by `compiler` after its attention over a StaticCache was rewritten.

    Called like Dynamo's graph, with the same inputs, and gives the same outputs; the cache's buffers among them have no
    storage of their own.
    """

    def __init__(self, lowered: Lowered, sites: Sequence[CachedSite], plan: Plan, compiler: Compiler) -> None:
        keys = [cached.site.key.meta["val"] for cached in sites]
        # Whole, as one graph is compiled for every length of a text.
        devices, dtypes = tuple(key.device for key in keys), tuple(key.dtype for key in keys)
        self.format = CacheFormat(plan, dtypes, devices[0], devices, begins_whole=True)
        self.batch, self.tokens = size_reader(keys[0].shape[0], lowered), size_reader(keys[0].shape[2], lowered)
        self.sites = [_SiteSource.of(cached, lowered) for cached in sites]
        sources = [side.source for site in self.sites for side in (site.key, site.value)]
        self.sources = [source for source in sources if source is not None]
        self.masks, self.counter = MaskReader(lowered, sites), Counter(lowered, sites)
        # Nothing of `lowered` itself is kept: it holds the inputs that were traced with, a cache among them.
        rewritten = rewrite_static(lowered, sites, plan.stored_sites())
        self.kept = rewritten.kept
        self.made = {
            output: (index, side)
            for output, buffer in rewritten.buffers.items()
            for index, cached in enumerate(sites)
            for side, candidate in enumerate((cached.key, cached.value))
            if candidate is buffer
        }
        state = self._fake_state(lowered, keys[0].shape[0])
        with torch.no_grad(), own_compiled_code():
            self.compiled = compiler(rewritten.module, [*(lowered.fakes[index] for index in self.kept), *state])

    def _fake_state(self, lowered: Lowered, batch: Any) -> list[Tensor]:
        """What the graph is traced with in the place of lengths, starts and state. Growing does not recompile it."""
        mode, layouts = lowered.fake_mode, self.format.plan.layouts()
        blocks = symbolic_sizes(mode, "blocks", layouts, TRACED_BLOCKS)
        with mode:
            fakes = [torch.empty(batch, dtype=torch.int64, device=self.format.device) for _ in ("lengths", "starts")]
            for layout, dtype in zip(layouts, self.format.state_dtypes, strict=True):
                fakes += SiteState.allocate(layout, batch, blocks[layout.window], dtype, self.format.device).tensors()
        return fakes

    @torch.no_grad()
    def __call__(self, *given: Any) -> list[Any]:
        inputs = list(given)
        for source in self.sources:
            inputs[source] = buffer_behind(given[source])
        batch, tokens = self.batch(inputs), self.tokens(inputs)
        cache = self._cache_of(inputs)
        seen = self.counter.seen(inputs, cache)
        self._check_capacity(inputs, seen, tokens)
        if seen == 0:
            cache.reset()
        starts = self._starts(inputs, cache, batch, tokens, seen)
        self._release(given, inputs, cache)
        outputs = list(cache.run(self.compiled, [inputs[index] for index in self.kept], starts, tokens))
        if not cache.every_row_goes_on:
            cache.every_row_goes_on = bool((cache.lengths > 0).all())
        self.counter.remember(inputs, cache)
        for output, (index, side) in self.made.items():
            buffer = (self.sites[index].key, self.sites[index].value)[side]
            shape = tuple(size(inputs) for size in buffer.shape)
            outputs[output] = released(shape, buffer.dtype, self.format.device, PackedSite(cache, index))
        return outputs

    def _cache_of(self, inputs: Sequence[Any]) -> PackedCache:
        """The packed cache that this call's buffers belong to, a new one where they belong to none."""
        sources = [side.source for site in self.sites for side in (site.key, site.value)]
        owners = [None if source is None else packed_site_of(inputs[source]) for source in sources]
        caches = {id(owner.cache): owner.cache for owner in owners if owner is not None}
        if not caches:
            return PackedCache(self.format)
        if len(caches) > 1 or None in owners:
            raise CacheError("the layers of this cache come from different caches: begin with a new StaticCache")
        (cache,) = caches.values()
        if cache.plan != self.format.plan:
            raise CacheError("this StaticCache was filled with another plan: begin with a new one")
        return cache

    def _check_capacity(self, inputs: Sequence[Any], seen: int, tokens: int) -> None:
        for site, planned in zip(self.sites, self.format.plan.sites, strict=True):
            slots = site.key.shape[2](inputs)
            if site.is_indexed and seen + tokens > slots:
                raise CacheError(
                    f"{site.layer}: {seen + tokens} tokens do not fit into a StaticCache of {slots}: make it with a "
                    "larger max_cache_len"
                )
            if site.is_indexed and 0 < planned.window < seen + tokens:
                raise CacheError(
                    f"{site.layer}: by the plan it attends to its last {planned.window} tokens, and its StaticCache "
                    f"keeps all {seen + tokens}: use kvmix_compile.apply, or another plan if this is not the model's"
                )
            if site.whole and seen:
                raise CacheError(
                    f"{site.layer}: the graph of a new text was called on a cache that holds {seen} tokens: begin with "
                    "a new StaticCache"
                )

    def _starts(self, inputs: Sequence[Any], cache: PackedCache, batch: int, tokens: int, seen: int) -> Tensor:
        """The padding that leads each row's new tokens, int64 `[batch]`."""
        known = bool(cache.states)
        # Of a short text it is looked at each time: a single token does not show whether there is a bias.
        is_looked_at = seen < BLOCK_TOKENS or looks_at_masks(tokens, seen, self.format.device)
        if known and not is_looked_at and cache.every_row_goes_on:
            return torch.zeros(batch, dtype=torch.int64, device=self.format.device)
        seen_masks = self.masks.read(inputs)
        padded = padding(seen_masks, batch, tokens, seen, cache.lengths if known else None).to(self.format.device)
        if seen and not known:
            self._adopt(inputs, cache, batch, seen, padded.clamp(max=seen))
        return (padded - seen).clamp(min=0)

    def _adopt(self, inputs: Sequence[Any], cache: PackedCache, batch: int, seen: int, starts: Tensor) -> None:
        """Pack what was written to the buffers before any compiled graph saw them: `seen` positions."""
        cache.begin(batch, seen)
        for state, stored, site in zip(cache.states, self.format.plan.stored_sites(), self.sites, strict=True):
            assert site.key.source is not None and site.value.source is not None
            key, value = (_history(inputs[source], seen) for source in (site.key.source, site.value.source))
            append_to(key, value, state, cache.lengths, starts, stored)
        cache.advance(seen, starts)

    def _release(self, given: Sequence[Any], inputs: Sequence[Any], cache: PackedCache) -> None:
        """Of the inputs that were given, some stand in for the buffers among `inputs`."""
        for index, site in enumerate(self.sites):
            for source in (site.key.source, site.value.source):
                if source is not None and packed_site_of(inputs[source]) is None:
                    release(inputs[source], PackedSite(cache, index))
                    belongs_to(given[source], PackedSite(cache, index))


def _history(buffer: Tensor, seen: int) -> Tensor:
    """The `seen` tokens before this call, `[batch, kv_heads, seen, dim]`; zeros for those that left the window."""
    slots = buffer.shape[2]
    if seen <= slots:
        return buffer[:, :, :seen]
    return torch.nn.functional.pad(buffer, (0, 0, seen - slots, 0))
