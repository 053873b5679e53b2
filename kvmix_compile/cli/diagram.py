"""Diagrams of a page: where lines, points and ticks lie, in percent of width and height. The page draws them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST_TICKS = 6
ROUND_STEPS = (1, 2, 2.5, 5, 10)
# Above and below what is drawn, as a share of its extent.
MARGIN = 0.06


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in percent of it."""

    place: float
    label: str


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, in steps of what is added or, where it is logarithmic, multiplied. `unit` follows the
    numbers of its ticks.
    """

    label: str
    low: float
    high: float
    logarithmic: bool = False
    unit: str = ""

    @classmethod
    def around(cls, label: str, numbers: Sequence[float], *, logarithmic: bool = False, unit: str = "") -> "Axis":
        """The axis that shows all of the numbers, with a margin."""
        scaled = [_scale(logarithmic)(number) for number in numbers]
        low, high = min(scaled), max(scaled)
        margin = MARGIN * (high - low) or 0.5
        low, high = low - margin, high + margin
        return cls(label, 10**low, 10**high, True, unit) if logarithmic else cls(label, low, high, False, unit)

    def place(self, number: float) -> float:
        """Where a number lies, in percent from `low` to `high`; what lies beyond them is put there."""
        scale = _scale(self.logarithmic)
        inside = min(max(number, self.low), self.high)
        return round(100 * (scale(inside) - scale(self.low)) / (scale(self.high) - scale(self.low)), 2)

    def ticks(self) -> list[Tick]:
        """At round numbers, MOST_TICKS at most."""
        numbers = self._powers() if self.logarithmic else self._multiples()
        return [Tick(self.place(number), f"{number:,.10g}{self.unit}") for number in numbers]

    def _multiples(self) -> list[float]:
        least = (self.high - self.low) / MOST_TICKS
        power = 10.0 ** math.floor(math.log10(least))
        step = next(power * step for step in ROUND_STEPS if power * step >= least * (1 - 1e-9))
        return [number * step for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]

    def _powers(self) -> list[float]:
        """Powers of ten; where they are too few, what lies between them too."""
        powers = [10.0**number for number in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))]
        for steps in ((1,), (1, 3), (1, 2, 5)):
            numbers = [power * step for power in powers for step in steps if self.low <= power * step <= self.high]
            if len(numbers) >= MOST_TICKS / 2:
                break
        return numbers


@dataclass(frozen=True)
class Point:
    """A point in percent from the left and from below, and what it says when it is pointed at. is_beyond: whether it
    lies above what is drawn, and is shown at the edge.
    """

    left: float
    bottom: float
    title: str
    is_beyond: bool = False


@dataclass(frozen=True)
class Line:
    """Points that belong together. `colour`: which of the page's colours for lines it has, from 0."""

    name: str
    points: tuple[Point, ...]
    colour: int = 0
    marks: bool = True

    @property
    def path(self) -> str:
        """Of an SVG's polyline, which counts from above."""
        return " ".join(f"{point.left:g},{100 - point.bottom:g}" for point in self.points)


@dataclass(frozen=True)
class Rule:
    """A dashed line across the diagram: at this percent from below, or from the left where it is upright."""

    place: float
    label: str
    upright: bool = False


@dataclass(frozen=True)
class Diagram:
    """One diagram, as a page draws it."""

    title: str
    across: Axis
    up: Axis
    lines: tuple[Line, ...]
    rules: tuple[Rule, ...] = ()

    @property
    def beyond(self) -> list[str]:
        """What the points say that lie above what is drawn."""
        return list(dict.fromkeys(point.title for line in self.lines for point in line.points if point.is_beyond))


def _scale(logarithmic: bool) -> Callable[[float], float]:
    return math.log10 if logarithmic else float
