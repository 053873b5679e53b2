"""Exponents: the powers of two by which heads of keys and values are divided where they are kept quantized.

Scales and zero points are float16. Heads of a float32 or bfloat16 model whose elements go far beyond that, or are so
small that the steps between codes are no float16, are brought into its range. Dividing by a power of two is exact, and
taken back exactly: queries are multiplied by the power of their keys, what attention gives by the power of its values.
There is room for elements 16 times as large as any that was seen, beyond which they are clamped.
"""

from collections.abc import Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor, fx

from kvmix_compile.kernels.format.packing import FLOAT16_MAX
from kvmix_compile.passes.allocate.plan import MOST_EXPONENT, Plan, SitePlan
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.match.mixing import running
from kvmix_compile.passes.match.sites import AttentionSite
from kvmix_compile.passes.rewrite.powers import powers_of_two
from kvmix_compile.passes.rewrite.rotation import there

# A head whose largest element lies between these is stored as it is. With 8 bits, steps between the codes of the least
# one are float16 with all its digits.
LEAST_LARGEST, MOST_LARGEST = 2.0**-6, FLOAT16_MAX / 16
# Any other is divided so that its largest element lies between 2**4 and 2**5.
WANTED = 5
# What a plan says is left as it is where that brings the largest element between these.
LEAST_KEPT, MOST_KEPT = 2.0**-10, FLOAT16_MAX / 4

# Tokens behind the sinks on which the range is looked at where there is a plan and nothing is measured.
PROBE_TOKENS = 64


def exponents_of(largest: Tensor) -> tuple[int, ...]:
    """By which power of two each head is divided, where `largest` `[heads]` are the magnitudes of their largest
    elements, in the model's dtype; empty where none is.
    """
    # In float16 all fit that the model has, and a query multiplied might not.
    if largest.dtype == torch.float16:
        return ()
    heads = largest.double()
    fits = (heads >= LEAST_LARGEST) & (heads <= MOST_LARGEST) | (heads == 0)
    exponents = (torch.frexp(heads).exponent - WANTED).clamp(-MOST_EXPONENT, MOST_EXPONENT).masked_fill(fits, 0)
    return tuple(exponents.tolist()) if not bool(fits.all()) else ()


def with_fitting_exponents(plan: Plan, captured: Captured, sites: Sequence[AttentionSite]) -> Plan:
    """The plan with exponents for what it quantizes and would not fit: it may have been made for other weights, or by
    hand. The model is run on a few tokens.

    Raises UnsupportedModelError, naming the layer, where keys or values are not finite there.
    """
    if not any(site.key.is_quantized or site.value.is_quantized for site in plan.sites):
        return plan
    tokens = min(plan.sinks + PROBE_TOKENS, captured.longest_context or plan.sinks + PROBE_TOKENS)
    rotated = {site.layer for site in plan.sites if site.values_rotated}
    seen = _Ranges(captured, sites, rotated).on(tokens, min(plan.sinks, tokens - 1))
    return replace(plan, sites=tuple(_fitting(site, *seen[site.layer]) for site in plan.sites))


def _fitting(site: SitePlan, key: Tensor, value: Tensor) -> SitePlan:
    return replace(
        site,
        key_exponents=_kept_or_new(site.key_exponents, key) if site.key.is_quantized else (),
        value_exponents=_kept_or_new(site.value_exponents, value) if site.value.is_quantized else (),
    )


def _kept_or_new(planned: tuple[int, ...], largest: Tensor) -> tuple[int, ...]:
    """Those of the plan where they do: a few tokens say less than the texts that it was made on."""
    heads = largest.double()
    kept = heads / powers_of_two(planned or [0] * len(heads), 1, heads).flatten()
    does = largest.dtype != torch.float16 and bool(((kept >= LEAST_KEPT) & (kept <= MOST_KEPT) | (kept == 0)).all())
    return planned if does else exponents_of(largest)


class _Ranges(fx.Interpreter):
    """Runs the captured graph and looks at what the sites would store."""

    def __init__(self, captured: Captured, sites: Sequence[AttentionSite], rotated: Set[str]) -> None:
        """rotated: the layers whose values are."""
        super().__init__(captured.module)
        self.captured, self.sites = captured, sites
        self.rotated = {site.value for site in sites if site.layer in rotated}
        self.watched = {node for site in sites for node in (site.key, site.value)}
        self.largest: dict[fx.Node, Tensor] = {}
        self.first = 0

    def on(self, tokens: int, first: int) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer the magnitudes `[heads]` of the largest elements of keys and of values, from token `first` on."""
        self.first = first
        (row,) = self.captured.random_ids(1, tokens)
        with torch.no_grad(), running(self.captured):
            self.run(*self.captured.inputs(row, logits=slice(-1, None)))
        for site in self.sites:
            for node, what in ((site.key, "keys"), (site.value, "values")):
                check_finite(self.largest[node], f"its {what}", site.layer)
        return {site.layer: (self.largest[site.key], self.largest[site.value]) for site in self.sites}

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if node in self.watched:
            heads = value[0, :, self.first :]
            heads = heads @ there(heads.shape[-1], heads) if node in self.rotated else heads
            self.largest[node] = self.captured.head_ranks.joined(largest_of(heads))
        return value


def largest_of(heads: Tensor) -> Tensor:
    """The magnitude of each head's largest element, `[heads]`, of `[heads, tokens, dim]`."""
    return heads.abs().amax((1, 2))


def check_finite(numbers: Tensor, what: str, layer: str) -> None:
    """Raise UnsupportedModelError where what was measured is no number."""
    if not bool(numbers.isfinite().all()):
        raise UnsupportedModelError(
            f"{layer}: {what} are not finite, as the model overflows its dtype or has weights that do: load it in a "
            "wider dtype, or from another source"
        )


def described(plan: Plan) -> list[str]:
    """A sentence for each site's keys or values that are kept divided."""
    return [
        f"{site.layer}: {name} are kept divided by powers of two (2**{max(exponents, key=abs)}), as float16's scales "
        "would not hold them as they are"
        for site in plan.sites
        for name, exponents in (("keys", site.key_exponents), ("values", site.value_exponents))
        if exponents
    ]
