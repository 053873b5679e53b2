"""Counting: how many positions a StaticCache has seen when a graph is called on it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from kvmix_compile.backend.storage import PackedCache
from kvmix_compile.errors import CacheError
from kvmix_compile.passes.capture.dynamo import Lowered
from kvmix_compile.passes.capture.sizes import Size, size_reader
from kvmix_compile.passes.graph.dataflow import Dataflow
from kvmix_compile.passes.graph.subgraph import subgraph
from kvmix_compile.passes.graph.vocabulary import graph_inputs
from kvmix_compile.passes.match.static_cache import CachedSite


class Counter:
    """Reads it off the position that the graph writes to. Where that is a tensor on a device, the host looks again only
    after somebody else changed it.
    """

    def __init__(self, lowered: Lowered, sites: Sequence[CachedSite]) -> None:
        positions = [cached.key.position for cached in sites if cached.key.position is not None]
        self.read: fx.GraphModule | None = None
        self.sources: list[int] = []
        if positions:
            self.read = subgraph(lowered.module, positions[:1])
            behind = Dataflow(lowered.graph).ancestors(positions[0])
            self.sources = [index for index, node in enumerate(graph_inputs(lowered.graph)) if node in behind]
        # Only windows: a window that is not yet full says it by its size.
        key = sites[0].key
        self.held: Size | None = None
        if key.holds_all:
            read, new = (size_reader(node.meta["val"].shape[2], lowered) for node in (key.read, key.new))
            self.held = lambda inputs: read(inputs) - new(inputs)
        self.window = size_reader(key.slots, lowered)

    def seen(self, inputs: Sequence[Any], cache: PackedCache) -> int:
        """Positions before this call. Raises CacheError where the cache was changed by somebody else, except to
        nothing.
        """
        versions = self._versions(inputs)
        if versions is not None and versions == cache.counters:
            return cache.seen
        seen = self._read(inputs, cache)
        if seen and cache.states and seen != cache.seen:
            raise CacheError(
                f"this StaticCache counts {seen} tokens and {cache.seen} were written to it: it was changed from "
                "outside. Begin with a new one, or call its reset()"
            )
        return seen

    def remember(self, inputs: Sequence[Any], cache: PackedCache) -> None:
        """To be called when the graph has counted the new tokens."""
        cache.counters = self._versions(inputs)

    def _read(self, inputs: Sequence[Any], cache: PackedCache) -> int:
        if self.read is not None:
            return int(self.read(*inputs)[0][0])
        if self.held is not None:
            return self.held(inputs)
        return cache.seen if cache.states else self.window(inputs)

    def _versions(self, inputs: Sequence[Any]) -> tuple[int, ...] | None:
        """What changes whenever a counter is written to; None where it cannot be told, or costs nothing to look."""
        counters = [inputs[index] for index in self.sources if isinstance(inputs[index], Tensor)]
        if not counters or any(counter.device.type == "cpu" or counter.is_inference() for counter in counters):
            return None
        return tuple(number for counter in counters for number in (id(counter), counter._version))
