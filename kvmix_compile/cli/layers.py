"""Layers side by side, as rows of coloured cells: what was measured of them, the bits they get, what they then lose."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from kvmix_compile.cli.picture import meaning
from kvmix_compile.evaluate.plots import SMALLEST, relative
from kvmix_compile.kernels.format.precision import UNQUANTIZED_BITS, Precision
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.measure.importance import Importance

MOST_CELLS = 32  # a line of these fits the width of a page on paper


@dataclass(frozen=True)
class Cell:
    """One layer's: how strongly it is coloured, from 0 to 1, what it says, and what it says when it is pointed at."""

    strength: float
    text: str
    title: str


@dataclass(frozen=True)
class Row:
    """Cells of all layers. kind: "importance", "bits" or "loss"; `heading`: of the rows that begin with this one."""

    label: str
    kind: str
    cells: tuple[Cell, ...]
    heading: str = ""


@dataclass(frozen=True)
class Losses:
    """Loss in nats a token that keys and values of each site are predicted to lose as planned; None where that
    precision was not measured.
    """

    keys: tuple[float | None, ...]
    values: tuple[float | None, ...]

    @property
    def total(self) -> float | None:
        """Of all sites."""
        known = [loss for loss in chain(self.keys, self.values) if loss is not None]
        return sum(known) if len(known) == len(self.keys) + len(self.values) else None


def predicted_losses(importance: Importance, plan: Plan) -> Losses:
    """Of each site of `plan`, by what was measured."""
    pairs = list(zip(importance.sites, plan.sites, strict=True))
    return Losses(
        tuple(site.key_sensitivity.get(planned.key) for site, planned in pairs),
        tuple(site.value_sensitivity.get(planned.value) for site, planned in pairs),
    )


def layer_lines(importance: Importance, plan: Plan) -> list[tuple[range, list[Row]]]:
    """Lines of MOST_CELLS layers at most, about equally long: which layers they are of, and their rows."""
    rows = list(_rows(importance, plan))
    layers = len(plan.sites)
    length = math.ceil(layers / math.ceil(layers / MOST_CELLS))
    starts = range(0, layers, length)
    return [
        (
            range(start, min(start + length, layers)),
            [Row(row.label, row.kind, row.cells[start : start + length], row.heading) for row in rows],
        )
        for start in starts
    ]


def _rows(importance: Importance, plan: Plan) -> Iterator[Row]:
    sites, names = importance.sites, [site.layer for site in plan.sites]
    worst_keys = [max(site.key_sensitivity.values()) for site in sites]
    worst_values = [max(site.value_sensitivity.values()) for site in sites]
    yield from _heat(
        "what the worst precision would lose", "importance", names, worst_keys, worst_values, "nats a token"
    )
    yield from _heat(
        "the paper's score: norm of the gradient", "importance", names,
        [site.key_gradient_norm for site in sites], [site.value_gradient_norm for site in sites], "",
    )  # fmt: skip
    keys, values = [site.key for site in plan.sites], [site.value for site in plan.sites]
    yield _bits("keys", names, keys, [site.key_dim for site in plan.sites], "bits of the plan")
    yield _bits("values", names, values, [site.value_dim for site in plan.sites])
    losses = predicted_losses(importance, plan)
    if losses.total is not None:
        yield from _heat(
            "what the plan is predicted to lose", "loss", names,
            [loss or 0.0 for loss in losses.keys], [loss or 0.0 for loss in losses.values], "nats a token",
        )  # fmt: skip


def _heat(
    heading: str, kind: str, names: Sequence[str], keys: Sequence[float], values: Sequence[float], unit: str
) -> Iterator[Row]:
    """Coloured by the logarithm of each number's share of the highest."""
    for label, numbers, shares in zip(("keys", "values"), (keys, values), relative(keys, values), strict=True):
        cells = tuple(
            Cell(1 - share / math.log10(SMALLEST), "", f"{name}, {label}: {number:.2g} {unit}".rstrip())
            for name, number, share in zip(names, numbers, shares, strict=True)
        )
        yield Row(label, kind, cells, heading if label == "keys" else "")


def _bits(
    label: str, names: Sequence[str], precisions: Sequence[Precision], dimensions: Sequence[int], heading: str = ""
) -> Row:
    cells = tuple(
        Cell(
            strength=math.log2(precision.mean_bits) / math.log2(UNQUANTIZED_BITS),
            text=f"{precision.mean_bits:.2g}",
            title=f"{name}, {label}: {meaning(precision)}; {precision.stored_bits(dimension):.2f} bits stored",
        )
        for name, precision, dimension in zip(names, precisions, dimensions, strict=True)
    )
    return Row(label, "bits", cells, heading)
