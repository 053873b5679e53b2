"""Sites: which of a plan's layers one of vLLM's is, and what its attention is told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvmix_compile.errors import PlanError
from kvmix_compile.kernels.weighting import Weighting
from kvmix_compile.passes.allocate.plan import Plan, SitePlan, StoredSite
from kvmix_compile.passes.rewrite.powers import powers_of_two
from kvmix_compile.passes.rewrite.rotation import back, there

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention


@dataclass(frozen=True)
class Basis:
    """How one layer's keys and values are stored, and what is done to its queries and its output for that; each None
    where nothing is. All but the orders in the dtype of the model.

    key_order, query_order: int64 [heads, key_dim], for each head its channels in the order that they are kept in.
    key_powers [heads, 1], query_powers [query heads, 1], value_powers and output_powers alike: powers of two.
    rotation, back: [value_dim, value_dim].
    """

    key_order: Tensor | None = None
    query_order: Tensor | None = None
    key_powers: Tensor | None = None
    query_powers: Tensor | None = None
    value_powers: Tensor | None = None
    output_powers: Tensor | None = None
    rotation: Tensor | None = None
    back: Tensor | None = None

    @classmethod
    def of(cls, stored: StoredSite, query_heads: int, like: Tensor) -> Basis:
        """Of a site with so many heads of queries; in the dtype of `like` and on its device."""
        shared, size = query_heads // stored.layout.kv_heads, stored.layout.value_dim

        def powers(exponents: tuple[int, ...], sign: int, repeats: int = 1) -> Tensor | None:
            each = [exponent for exponent in exponents for _ in range(repeats)]
            return powers_of_two(each, sign, like)[0, :, :, 0] if each else None

        order = None if stored.channel_order is None else torch.tensor(stored.channel_order, device=like.device)
        return cls(
            key_order=order,
            query_order=None if order is None else order.repeat_interleave(shared, dim=0),
            key_powers=powers(stored.key_exponents, -1),
            query_powers=powers(stored.key_exponents, 1, shared),
            value_powers=powers(stored.value_exponents, -1),
            output_powers=powers(stored.value_exponents, 1, shared),
            rotation=there(size, like) if stored.values_rotated else None,
            back=back(size, like) if stored.values_rotated else None,
        )

    def of_queries(self, query: Tensor) -> Tensor:
        """query: [tokens, query heads, key_dim]."""
        return _times(_ordered(query, self.query_order), self.query_powers)

    def of_keys(self, key: Tensor) -> Tensor:
        """key: [tokens, heads, key_dim]."""
        return _times(_ordered(key, self.key_order), self.key_powers)

    def of_values(self, value: Tensor) -> Tensor:
        """value: [tokens, heads, value_dim]."""
        value = _times(value, self.value_powers)
        return value if self.rotation is None else value @ self.rotation

    def of_output(self, output: Tensor) -> Tensor:
        """The inverse of `of_values`, for what attention gives: [tokens, query heads, value_dim]."""
        output = output if self.back is None else output @ self.back
        return _times(output, self.output_powers)


@dataclass(frozen=True)
class ServedSite:
    """One layer on one rank.

    stored: what its plan says of the rank's heads. weighting: how it attends.
    """

    name: str
    stored: StoredSite
    weighting: Weighting


def site_of(layer: Attention, plan: Plan, rank: int, ranks: int) -> ServedSite:
    """What one of vLLM's layers is served with.

    Raises PlanError where the plan has no such layer, or one of another shape.
    """
    planned = _planned(layer.layer_name, plan)
    _check_shape(layer, planned, ranks)
    own = plan.of_heads(rank, ranks)
    stored = own.stored_sites()[plan.sites.index(planned)]
    return ServedSite(planned.layer, stored, _weighting(layer))


def _planned(name: str, plan: Plan) -> SitePlan:
    """The site whose name has the same number: what else is in a name, vLLM and transformers may call otherwise."""
    number = _numbers(name)
    found = [site for site in plan.sites if _numbers(site.layer) == number]
    if len(found) != 1:
        raise PlanError(
            f"this plan was made for another model: it has {len(found)} layers of the number of {name}. Make a new "
            "plan for this model"
        )
    return found[0]


def _numbers(name: str) -> list[str]:
    return re.findall(r"(?<![^.])\d+(?![^.])", name)


def _check_shape(layer: Attention, planned: SitePlan, ranks: int) -> None:
    found = {"kv_heads": layer.num_kv_heads * ranks, "key_dim": layer.head_size, "value_dim": layer.head_size_v}
    for name, number in found.items():
        if getattr(planned, name) != number:
            raise PlanError(
                f"this plan was made for another model: {planned.layer} has {name}={getattr(planned, name)} there, and "
                f"{layer.layer_name} has {number}. Make a new plan for this model"
            )
    window = layer.sliding_window or 0
    if planned.window and not 0 < window <= planned.window:
        raise PlanError(
            f"the plan keeps the last {planned.window} tokens of {planned.layer}, and {layer.layer_name} attends to "
            f"{window or 'all'}: make a new plan for this model"
        )


def _weighting(layer: Attention) -> Weighting:
    attention = layer.impl
    return Weighting(
        scale=attention.scale,
        softcap=attention.softcap,
        sliding_window=layer.sliding_window or 0,
        sink_logits=attention.sink_logits,
        slopes=attention.slopes,
    )


def _ordered(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else rows.gather(-1, order.expand(rows.shape[0], -1, -1))


def _times(rows: Tensor, powers: Tensor | None) -> Tensor:
    return rows if powers is None else rows * powers
