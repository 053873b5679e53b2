"""A picture of a plan for the terminal: bits of keys and of values over the layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.passes.allocate.plan import Plan, SitePlan

LABEL_WIDTH = 7
CELL_WIDTH = 4
MOST_CELLS = 24  # a line of 103 columns: wider ones are harder to read than two
NUMBERED = 4  # every fourth layer has its number: a cell is too narrow for three digits and a gap
BAR_LINES = 3
BLOCKS = " ▁▂▃▄▅▆▇█"
COLOURS = {1: "red", 2: "dark_orange3", 3: "yellow3", 4: "green4", 8: "dodger_blue2", 16: "purple"}


def plan_picture(plan: Plan) -> PlanPicture:
    """A renderable of rich, `Console().print(plan_picture(plan))`, as wide as the console allows."""
    return PlanPicture(plan)


@dataclass(frozen=True)
class PlanPicture:
    """The bits of every layer as bars and coloured cells, the precisions in use, and the means."""

    plan: Plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._lines(options.max_width):
            line.truncate(options.max_width, overflow="ellipsis")
            yield line

    def _lines(self, width: int) -> Iterator[Text]:
        sites = self.plan.sites
        yield Text(f"{len(sites)} layers, {sites[0].layer} to {sites[-1].layer}")
        most_cells = min(MOST_CELLS, max(1, (width - LABEL_WIDTH) // CELL_WIDTH))
        rows = math.ceil(len(sites) / most_cells)
        # Rows of about the same length, whose numbered layers stand below each other.
        cells = min(most_cells, NUMBERED * math.ceil(len(sites) / rows / NUMBERED))
        highest = max(_mean_bits(site) for site in sites)
        for start in range(0, len(sites), cells):
            yield Text()
            yield from _row(sites[start : start + cells], start, highest)
        yield Text()
        yield from _legend(sites)
        yield Text()
        yield from _means(self.plan)


def _row(sites: Sequence[SitePlan], start: int, highest: float) -> Iterator[Text]:
    """Some layers side by side: bars of their mean bits, keys, values, and numbers of the layers."""
    yield from _bars([_mean_bits(site) for site in sites], highest)
    yield _cells("keys", [site.key for site in sites])
    yield _cells("values", [site.value for site in sites])
    indices = range(start, start + len(sites))
    axis = "".join(f"{index:3}".ljust(CELL_WIDTH) if index % NUMBERED == 0 else " " * CELL_WIDTH for index in indices)
    yield Text(("layer".ljust(LABEL_WIDTH) + axis).rstrip(), style="dim")


def _bars(bits: Sequence[float], highest: float) -> Iterator[Text]:
    """A bar chart, BAR_LINES high, from 0 to `highest` bits."""
    levels = len(BLOCKS) - 1
    heights = [round(BAR_LINES * levels * number / highest) for number in bits]
    for line in reversed(range(BAR_LINES)):
        blocks = [BLOCKS[min(levels, max(0, height - line * levels))] for height in heights]
        label = f"{highest:g}" if line == BAR_LINES - 1 else "bits" if line == 0 else ""
        bars = "".join(f" {block * 3}" for block in blocks)
        yield Text((label.ljust(LABEL_WIDTH) + bars).rstrip())


def _cells(label: str, precisions: Sequence[Precision]) -> Text:
    line = Text(label.ljust(LABEL_WIDTH))
    for precision in precisions:
        line.append_text(_cell(precision))
    return line


def _cell(precision: Precision) -> Text:
    """Bits of a code; their mean where the channels have different ones."""
    bits = f"{precision.mean_bits:.1f}" if precision.important_bits else f"{precision.bits}"
    return Text(f"{bits:>3} ", style=f"bold white on {COLOURS[precision.bits]}")


def _legend(sites: Sequence[SitePlan]) -> Iterator[Text]:
    """A line for each precision in use: what it is, and how many layers use it."""
    keys, values = Counter(site.key for site in sites), Counter(site.value for site in sites)
    used = sorted({*keys, *values})
    width = max(len(meaning(precision)) for precision in used)
    for precision in used:
        counts = f"layers: {keys[precision]} for keys, {values[precision]} for values"
        yield Text("  ").append_text(_cell(precision)).append(f" {meaning(precision):<{width}}   {counts}")
    if any(precision.important_bits for precision in keys):
        yield Text("  4/3/2/2: bits by tier of a head's channels, the most important first", style="dim")


def meaning(precision: Precision) -> str:
    """A precision in a few words."""
    if not precision.is_quantized:
        return "the model's own dtype"
    groups = f"groups of {precision.group}, {precision.scale_bits}-bit scales"
    return f"{'/'.join(map(str, precision.tiers))}, {groups}" if precision.important_bits else groups


def _means(plan: Plan) -> Iterator[Text]:
    yield Text(
        f"code bits {plan.code_bits:.2f} (keys {plan.key_bits:.2f}, values {plan.value_bits:.2f}), "
        f"stored bits {plan.storage_bits:.2f}",
        style="bold",
    )
    yield Text(f"policy {plan.policy}, {plan.sinks} sink tokens and {plan.recent} recent tokens unquantized")


def _mean_bits(site: SitePlan) -> float:
    """Code bits of a cached element of this site."""
    bits = site.key.mean_bits * site.key_elements + site.value.mean_bits * site.value_elements
    return bits / (site.key_elements + site.value_elements)
