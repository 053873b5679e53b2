"""Cache format: what a model's keys and values are kept as, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvmix_compile.errors import CacheError
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.capture.ranks import Ranks
from kvmix_compile.passes.capture.single_nodes import CarriedState


@dataclass(frozen=True)
class CacheFormat:
    """What a cache is made for.

    plan: at which precision each site is kept. dtypes: of each site's keys and values as the graph computes them.
    device: where the model takes its token ids. site_devices: where each site's keys and values are made, and kept.
    weights: the fingerprint of those that the keys and values were computed with. carried: what layers carry from token
    to token besides. begins_whole: whether there is room for all first and recent tokens from the beginning, as what is
    compiled for a state's sizes needs it. ranks: the processes whose caches belong together; the plan is of this one's
    heads. rounds_nothing: whether first and recent tokens stay in the dtype that they are computed in, as in no cache
    but that of a trial.
    """

    plan: Plan
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    site_devices: tuple[torch.device, ...]
    weights: str = ""
    carried: tuple[CarriedState, ...] = ()
    begins_whole: bool = False
    ranks: Ranks = Ranks()
    rounds_nothing: bool = False

    @property
    def of_a_trial(self) -> CacheFormat:
        """The same of a cache that rounds nothing: what a graph gives of so few tokens that none is packed yet is the
        model's own, but for the order of sums.
        """
        return replace(self, rounds_nothing=True)

    @property
    def state_dtypes(self) -> tuple[torch.dtype, ...]:
        """Of each site's first and recent tokens as its state keeps them."""
        if self.rounds_nothing:
            return self.dtypes
        pairs = zip(self.plan.layouts(), self.dtypes, strict=True)
        return tuple(layout.unquantized_dtype(dtype) for layout, dtype in pairs)

    @property
    def carrying_layers(self) -> str:
        """Who carries, for a message."""
        more = f" and {len(self.carried) - 1} more" if len(self.carried) > 1 else ""
        return f"{self.carried[0].layer}{more}" if self.carried else ""


def format_of(model: object) -> CacheFormat:
    """That of a compiled model. Raises CacheError for another."""
    program = getattr(model, "kvmix_program", None)
    if program is None:
        raise CacheError(
            f"this {type(model).__name__} is not compiled, and its keys and values do not go to a KVMixCache: make "
            "one of what kvmix_compile.apply(model) returned"
        )
    found: CacheFormat = program.format
    return found
