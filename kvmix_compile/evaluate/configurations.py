"""What `kvmix eval` compares: a model with one way of keeping its keys and values, and what that takes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from kvmix_compile.compiler import apply_plans
from kvmix_compile.kernels.format.precision import UNQUANTIZED_BITS
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.allocate.policies import BudgetError
from kvmix_compile.passes.measure.importance import Importance
from kvmix_compile.runtime.cache import KVMixCache

# How the names of those end whose chunks are exact.
EXACT_CHUNKS = "exact chunks"


@dataclass(frozen=True)
class Configuration:
    """A model that keeps its keys and values in one way; this one as they are, in the model's own dtype.

    Bits are per cached element, and an unquantized element counts as 16.
    """

    name: str
    model: Any

    @property
    def code_bits(self) -> float:
        """Bits of a quantized element's code."""
        return UNQUANTIZED_BITS

    @property
    def stored_bits(self) -> float:
        """Bits of a quantized element, its share of scales and zero points included."""
        return UNQUANTIZED_BITS

    @property
    def unquantized_tokens(self) -> int:
        """The most tokens of a row that are not quantized."""
        return 0

    def new_cache(self) -> Any:
        """An empty cache for one text."""
        return DynamicCache()

    def held_bits(self, cache: Any) -> float:
        """Bits of an element averaged over everything that `cache` holds: unquantized tokens and room to grow into
        included.
        """
        return UNQUANTIZED_BITS


@dataclass(frozen=True)
class Compiled(Configuration):
    """A compiled model with its KVMixCache."""

    @property
    def plan(self) -> Plan:
        return self.model.kvmix_plan

    @property
    def code_bits(self) -> float:
        return self.plan.code_bits

    @property
    def stored_bits(self) -> float:
        return self.plan.storage_bits

    @property
    def unquantized_tokens(self) -> int:
        return self.plan.sinks + self.plan.recent

    def new_cache(self) -> KVMixCache:
        return KVMixCache(self.model)

    def held_bits(self, cache: KVMixCache) -> float:
        # As in a 16-bit model, whatever this one's dtype is: what is unquantized would count double in float32.
        elements = sum(site.visible_elements(cache.seen) for site in self.plan.sites)
        return 8 * self.plan.cache_bytes(cache.seen, dtype=torch.bfloat16) / elements


def make_plans(
    importance: Importance, policies: Iterable[str], budgets: Iterable[float], storage_budgets: Iterable[float]
) -> tuple[dict[str, Plan], list[str]]:
    """A named plan of each policy at each budget, and why there are none of some: a policy cannot meet every budget.

    Raises BudgetError where there is none at all.
    """
    plans: dict[str, Plan] = {}
    left_out: list[str] = []
    for policy in policies:
        for unit, numbers in (("budget", budgets), ("storage_budget", storage_budgets)):
            for bits in numbers:
                name = f"{policy}, {unit.replace('_', ' ')} {bits:g}"
                try:
                    plans[name] = importance.allocate(policy=policy, **{unit: bits})  # type: ignore[arg-type]
                except BudgetError as error:
                    left_out.append(f"{name} is left out: {error}")
    if left_out and not plans:
        raise BudgetError("\n".join(left_out))
    return plans, left_out


def compile_plans(model: nn.Module, plans: Mapping[str, Plan]) -> list[Compiled]:
    """`model` compiled for each plan."""
    return list(map(Compiled, plans, apply_plans(model, list(plans.values()))))
