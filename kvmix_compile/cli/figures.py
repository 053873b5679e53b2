"""The figures of a page: loss over bits as predicted and as measured, and the size of a cache over its tokens."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from kvmix_compile.cli.diagram import Axis, Diagram, Line, Point, Rule
from kvmix_compile.cli.layers import predicted_losses
from kvmix_compile.cli.tables import megabytes
from kvmix_compile.compiler import Examined
from kvmix_compile.errors import BudgetError
from kvmix_compile.evaluate.comparison import Result
from kvmix_compile.evaluate.configurations import make_plans
from kvmix_compile.evaluate.plots import HIGHEST, STORED_BITS, family_of
from kvmix_compile.evaluate.records import TextResults
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.measure.importance import USUAL_CONTEXT

# Of the predicted frontier. Below, hardly any model is itself; above, none loses anything.
STORAGE_BUDGETS = tuple(1.5 + step / 4 for step in range(19))
SIZES = 65  # points of a curve of sizes, its ends included
TABLED_SIZES = 6
UNQUANTIZED_BYTES = 2


@dataclass(frozen=True)
class Size:
    """Bytes of a row of so many tokens: as planned, everything counted, and unquantized; in 16 bits what is not."""

    tokens: int
    compressed: int
    unquantized: int

    @property
    def share(self) -> float:
        """How many times smaller."""
        return self.unquantized / self.compressed


@dataclass(frozen=True)
class Choice:
    """One way to spend bits: stored bits an element, bytes of a packed token, and by how many percent perplexity is
    predicted to rise; None where its precisions were not measured.
    """

    stored_bits: float
    token_bytes: float
    rise: float | None


def perplexity_rise(loss: float) -> float:
    """By how many percent a loss of so many nats a token makes the perplexity larger."""
    return 100 * math.expm1(loss)


def choice(examined: Examined, plan: Plan) -> Choice:
    """What a plan for this model stores and is predicted to lose."""
    loss = predicted_losses(examined.importance, plan).total
    rise = None if loss is None else perplexity_rise(loss)
    return Choice(plan.storage_bits, plan.token_bytes(examined.dtypes), rise)


def best_choices(examined: Examined) -> list[Choice]:
    """What loses least at each of STORAGE_BUDGETS that can be met; none where nothing is predicted."""
    try:
        plans, _ = make_plans(examined.importance, ["fisher"], [], STORAGE_BUDGETS)
    except BudgetError:
        return []
    choices = dict.fromkeys(choice(examined, plan) for plan in plans.values())
    return [each for each in choices if each.rise]


def predicted_frontier(examined: Examined) -> Diagram | None:
    """The best choices, and the plan among them; None where there is nothing to draw a line through."""
    best, own = best_choices(examined), choice(examined, examined.plan)
    if len(best) < 2:
        return None
    drawn = [each for each in (*best, own) if each.rise]
    across = Axis.around(STORED_BITS, [each.stored_bits for each in (*best, own)])
    up = Axis.around(
        "rise of the perplexity, predicted", [each.rise or 0.0 for each in drawn], logarithmic=True, unit="%"
    )
    lines = [Line("least at each budget", _predicted(best, across, up))]
    if own.rise:
        lines.append(Line(f"this plan, {own.stored_bits:.2f} bits", _predicted([own], across, up), 1))
    rules = () if own.rise else (Rule(across.place(own.stored_bits), "this plan", upright=True),)
    return Diagram("Predicted", across, up, tuple(lines), rules)


def _predicted(choices: Sequence[Choice], across: Axis, up: Axis) -> tuple[Point, ...]:
    return tuple(
        Point(
            across.place(each.stored_bits),
            up.place(each.rise or 0.0),
            f"{each.stored_bits:.2f} bits stored: perplexity +{each.rise:.2g}%, {each.token_bytes:,.0f} bytes a token",
        )
        for each in choices
    )


def measured_frontiers(text: TextResults) -> list[Diagram]:
    """Perplexity, and divergence from the original, over bits; a line for each family of configurations."""
    original, *others = text.results
    finite = [result for result in others if math.isfinite(result.perplexity)]
    if not finite:
        return []
    across = Axis.around(STORED_BITS, [result.stored_bits for result in others])
    edge = HIGHEST * original.perplexity
    shown = [min(result.perplexity, edge) for result in finite]
    perplexity = Axis.around("perplexity through the cache", [original.perplexity, *shown])
    rule = Rule(perplexity.place(original.perplexity), f"the model itself, {original.perplexity:.2f}")
    diagrams = [Diagram(f"Perplexity: {text.text}", across, perplexity, _families(others, across, perplexity), (rule,))]
    divergences = [result.divergence.mean for result in finite if result.divergence.mean > 0]
    if divergences:
        up = Axis.around("KL divergence from the model itself", divergences, logarithmic=True)
        diagrams.append(Diagram(f"Divergence: {text.text}", across, up, _families(others, across, up, True)))
    return diagrams


def _families(results: Sequence[Result], across: Axis, up: Axis, divergence: bool = False) -> tuple[Line, ...]:
    families = groupby(results, key=family_of)
    return tuple(
        Line(
            family, tuple(_measured(sorted(members, key=lambda each: each.stored_bits), across, up, divergence)), index
        )
        for index, (family, members) in enumerate(families)
    )


def _measured(results: Sequence[Result], across: Axis, up: Axis, divergence: bool) -> Iterator[Point]:
    for result in results:
        number = result.divergence.mean if divergence else result.perplexity
        what = "KL divergence" if divergence else "perplexity"
        is_inside = number <= up.high  # what is not a number is not
        title = f"{result.configuration}: {result.stored_bits:.2f} bits stored, {what} {number:.4g}"
        yield Point(across.place(result.stored_bits), up.place(number) if is_inside else 100.0, title, not is_inside)


def sizes(examined: Examined, lengths: Sequence[int]) -> list[Size]:
    """What a row of each length takes."""
    return [
        Size(
            tokens,
            examined.plan.cache_bytes(tokens),
            UNQUANTIZED_BYTES * sum(site.visible_elements(tokens) for site in examined.plan.sites),
        )
        for tokens in lengths
    ]


def longest(examined: Examined) -> int:
    """Tokens of the longest text that sizes are told of."""
    return examined.longest_context or USUAL_CONTEXT


def tabled_sizes(examined: Examined) -> list[Size]:
    """Of the longest text, of one half as long, and so on; the shortest first."""
    return sizes(examined, sorted(longest(examined) >> halved for halved in range(TABLED_SIZES)))


def size_diagram(examined: Examined) -> Diagram:
    """Bytes of a row over its tokens."""
    points = sizes(examined, [longest(examined) * number // (SIZES - 1) for number in range(1, SIZES)])
    across = Axis("tokens of a text", 0, longest(examined))
    up = Axis("cache of one text", 0, max(point.unquantized for point in points) / 1e6 * 1.04, unit=" MB")
    series = (
        ("unquantized, in 16 bits", [point.unquantized for point in points]),
        ("as planned, everything counted", [point.compressed for point in points]),
    )
    return Diagram(
        "",
        across,
        up,
        tuple(
            Line(
                name,
                tuple(
                    Point(
                        across.place(point.tokens), up.place(count / 1e6), f"{point.tokens} tokens: {megabytes(count)}"
                    )
                    for point, count in zip(points, counts, strict=True)
                ),
                colour,
                marks=False,
            )
            for (name, counts), colour in zip(series, (2, 0), strict=True)
        ),
    )
