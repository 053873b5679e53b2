"""The report as one page of HTML that needs nothing else: no server, no script, no network."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jinja2 import Environment, PackageLoader

from kvmix_compile.cli.figures import (
    Choice,
    best_choices,
    choice,
    longest,
    measured_frontiers,
    perplexity_rise,
    predicted_frontier,
    size_diagram,
    sizes,
    tabled_sizes,
)
from kvmix_compile.cli.layers import layer_lines, predicted_losses
from kvmix_compile.cli.picture import meaning
from kvmix_compile.cli.tables import megabytes
from kvmix_compile.compiler import Examined
from kvmix_compile.evaluate.records import Evaluation, circumstances
from kvmix_compile.passes.allocate.outlook import ruined
from kvmix_compile.passes.allocate.plan import SitePlan
from kvmix_compile.report import Report, SiteReport

TEMPLATE = "report.html"


@dataclass(frozen=True)
class Tile:
    """A number that comes first, and a line about it."""

    label: str
    number: str
    remark: str


@dataclass(frozen=True)
class SiteLine:
    """One attention in the table of all: what was found, and, where there is a plan, what it stores and loses."""

    found: SiteReport
    key: str = ""
    value: str = ""
    key_loss: str = ""
    value_loss: str = ""


def page(name: str, report: Report, examined: Examined | None, evaluation: Evaluation | None = None) -> str:
    """The whole page of the model that was called `name`. examined: None where it cannot be compiled. evaluation: what
    was measured of its predictions.
    """
    environment = Environment(loader=PackageLoader("kvmix_compile.cli", "."), autoescape=True, trim_blocks=True)
    return environment.get_template(TEMPLATE).render(
        name=name,
        report=report,
        examined=examined,
        evaluation=evaluation,
        kinds=_kinds(report.sites),
        sites=_site_lines(report, examined),
        seconds=sum(report.seconds.values()),
        circumstances=circumstances("kvmix", torch.device("cpu")),
        tiles=_tiles(report, examined) if examined else [],
        ruined=ruined(examined.importance.sites, examined.plan) if examined else [],
        layers=layer_lines(examined.importance, examined.plan) if examined else [],
        frontier=predicted_frontier(examined) if examined else None,
        choices=_choices(examined) if examined else [],
        measured=[(text, measured_frontiers(text)) for text in evaluation.texts] if evaluation else [],
        sizes=tabled_sizes(examined) if examined else [],
        size_diagram=size_diagram(examined) if examined else None,
        megabytes=megabytes,
    )


def _tiles(report: Report, examined: Examined) -> list[Tile]:
    plan = examined.plan
    tiles = [
        Tile(
            "stored bits an element",
            f"{plan.storage_bits:.2f}",
            f"{plan.code_bits:.2f} of codes (keys {plan.key_bits:.2f}, values {plan.value_bits:.2f}), the rest scales "
            "and zero points; 16 unquantized",
        )
    ]
    if report.token_bytes is not None:
        own, dtypes = report.own_cache_bytes, sorted({str(dtype).removeprefix("torch.") for dtype in examined.dtypes})
        times = f"{own / report.token_bytes:.1f} times as many" if own else ""
        compared = f"{own:,.0f} in the model's own cache of {', '.join(dtypes)}: {times}" if own else ""
        tiles.append(Tile("bytes a token, once packed", f"{report.token_bytes:,.0f}", compared))
    loss = predicted_losses(examined.importance, plan).total
    if loss is not None:
        remark = f"{loss:.2g} nats a token, as far as {examined.importance.tokens:,} tokens of calibration tell"
        tiles.append(Tile("predicted rise of perplexity", f"{perplexity_rise(loss):.2g}%", remark))
    (size,) = sizes(examined, [longest(examined)])
    tiles.append(
        Tile(
            f"smaller at {size.tokens:,} tokens",
            f"{size.share:.1f}×",
            f"{megabytes(size.compressed)} rather than {megabytes(size.unquantized)} in 16 bits, everything counted",
        )
    )
    return tiles


def _choices(examined: Examined) -> list[tuple[Choice, bool]]:
    """Every other of the best choices and that of the plan, by their bits, and which of them is the plan's."""
    own = choice(examined, examined.plan)
    others = [(each, False) for each in best_choices(examined)[::2] if each != own]
    return sorted([*others, (own, True)], key=lambda pair: pair[0].stored_bits)


def _kinds(sites: Sequence[SiteReport]) -> list[tuple[int, SiteReport]]:
    """How many sites there are of each kind, and one of them."""
    examples = {(site.attention, site.query_heads, site.shape): site for site in reversed(sites)}
    counts = Counter((site.attention, site.query_heads, site.shape) for site in sites)
    return [(count, examples[kind]) for kind, count in counts.items()]


def _site_lines(report: Report, examined: Examined | None) -> list[SiteLine]:
    if examined is None:
        return [SiteLine(site) for site in report.sites]
    losses = predicted_losses(examined.importance, examined.plan)
    return [
        SiteLine(site, *_precisions(planned), _loss(key), _loss(value))
        for site, planned, key, value in zip(report.sites, examined.plan.sites, losses.keys, losses.values, strict=True)
    ]


def _precisions(planned: SitePlan) -> tuple[str, str]:
    key, value = (
        f"{precision.mean_bits:g} bits: {meaning(precision)}" if precision.is_quantized else "16 bits"
        for precision in (planned.key, planned.value)
    )
    return key, value


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.1e}" if loss else "0"
