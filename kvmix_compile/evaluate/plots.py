"""Plots of an evaluation as PNG files: the frontier of perplexity against bits, divergences, and a heat map of layers.

Needs matplotlib, an optional dependency.
"""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from kvmix_compile.errors import InputError
from kvmix_compile.evaluate.comparison import Result
from kvmix_compile.evaluate.configurations import EXACT_CHUNKS
from kvmix_compile.evaluate.divergence import POSITION_BIN
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.measure.importance import Importance

FRONTIER_FILE = "frontier.png"
DIVERGENCE_FILE = "divergence.png"
LAYERS_FILE = "layers.png"
DOTS_PER_INCH = 150
# Perplexities beyond this multiple of the original's are drawn at the edge, with their value: the others would be flat.
HIGHEST = 1.5
MARKERS = "osD^vPX*"
STORED_BITS = "stored bits per quantized element, scales and zero points included"
LINE_POINTS = 10  # families have lines of their own for such values, which may stand at the same bits
CELL_INCHES = 0.35
LABEL_INCHES = 3.5
FEWEST_CELLS = 12  # a narrower figure would cut its titles
# The share of the highest below which a number is drawn as this one; so are zero, and the norm that is unknown (NaN)
# where keys or values have no projection.
SMALLEST = 1e-4


def check_plots(folder: Path) -> None:
    """Raise InputError where matplotlib is not installed or `folder` cannot be made."""
    if find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib, which is not installed. Run: pip install 'kvmix-compile[plots]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror or error}") from error


def plot_frontier(texts: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Perplexity, and KL divergence from the original, against stored bits: for each named text one diagram of each,
    and in it a line for each family of configurations; a text's first result is the original's.
    """
    figure, diagrams = _figure(7 * len(texts), 9, rows=2, columns=len(texts))
    for above, below, (name, results) in zip(*diagrams.reshape(2, -1), texts.items(), strict=True):
        _plot_results(above, results)
        _plot_divergences(below, results)
        above.set_title(name, fontsize="medium")
    _save(figure, path)


def plot_divergence(texts: Mapping[str, Sequence[Result]], path: Path) -> None:
    """For each named text two diagrams of the divergence from the original: how it is distributed over the tokens, and
    how it goes along a window. A text's first result is the original's, which has none.
    """
    figure, diagrams = _figure(14, 4.5 * len(texts), rows=len(texts), columns=2)
    for (spread, along), (name, results) in zip(diagrams.reshape(-1, 2), texts.items(), strict=True):
        for result in results[1:]:
            found = result.divergence
            spread.plot(
                ["median", "mean", "99%", "99.9%", "largest"],
                [found.median, found.mean, found.worst_percent, found.worst_permille, found.largest],
                marker="o", label=result.configuration,
            )  # fmt: skip
            middles = [POSITION_BIN * (number + 0.5) for number in range(len(found.by_position))]
            along.plot(middles, found.by_position, marker="o", label=result.configuration)
        along.set_xlabel("position in the window")
        for axes, what in ((spread, "over the tokens"), (along, "along the window, means")):
            axes.set_yscale("log")
            axes.set_ylabel("KL divergence from the original")
            axes.set_title(f"{name}: {what}", fontsize="medium")
            axes.grid(alpha=0.3)
        spread.legend(fontsize="x-small")
    _save(figure, path)


def _plot_results(axes: Any, results: Sequence[Result]) -> None:
    original, others = results[0], results[1:]
    axes.axhline(original.perplexity, color="black", linestyle="--", label=f"original ({original.perplexity:.2f})")
    edge = HIGHEST * original.perplexity
    for index, (family, members) in enumerate(groupby(others, key=family_of)):
        _plot_family(axes, family, sorted(members, key=_stored_bits), index, edge)
    axes.set_xlabel(STORED_BITS)
    axes.set_ylabel("perplexity through the cache")
    axes.set_ylim(top=min(edge, axes.get_ylim()[1]) * 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _plot_divergences(axes: Any, results: Sequence[Result]) -> None:
    for index, (family, members) in enumerate(groupby(results[1:], key=family_of)):
        line = sorted(members, key=_stored_bits)
        divergences = [member.divergence.mean for member in line]
        axes.plot(
            [member.stored_bits for member in line], divergences, marker=MARKERS[index % len(MARKERS)], label=family
        )
    axes.set_xlabel(STORED_BITS)
    axes.set_ylabel("KL divergence from the original, mean")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def plot_layers(importance: Importance, plans: Mapping[str, Plan], path: Path) -> None:
    """Heat maps over the layers: what was measured of their keys and values, and the bits that each plan stores."""
    measured = _importance_rows(importance)
    bits = {f"{name}: {part}": row for name, plan in plans.items() for part, row in _bits_rows(plan).items()}
    width = LABEL_INCHES + CELL_INCHES * max(len(importance.sites), FEWEST_CELLS)
    lines = [len(measured), len(bits)]
    figure, (above, below) = _figure(width, 2 + CELL_INCHES * sum(lines), rows=2, height_ratios=lines)
    image = _heat_map(above, measured, "viridis")
    figure.colorbar(image, ax=above, label="log10 of the highest")
    above.set_title("importance", fontsize="medium")
    _heat_map(below, {name: [math.log2(number) for number in row] for name, row in bits.items()}, "YlGnBu")
    _write_in_cells(below, list(bits.values()))
    below.set_title("stored bits of an element, scales and zero points included", fontsize="medium")
    below.set_xlabel("layer")
    _save(figure, path)


def _importance_rows(importance: Importance) -> dict[str, list[float]]:
    """The loss predicted at the precision that would lose most (the policy fisher goes by such losses) and the scores
    of kvmix, as log10 of their shares of the highest of keys and values.
    """
    sites = importance.sites
    losses = relative(
        [max(site.key_sensitivity.values()) for site in sites],
        [max(site.value_sensitivity.values()) for site in sites],
    )
    norms = relative([site.key_gradient_norm for site in sites], [site.value_gradient_norm for site in sites])
    return {
        "keys: predicted loss": losses[0],
        "values: predicted loss": losses[1],
        "keys: gradient norm": norms[0],
        "values: gradient norm": norms[1],
    }


def _bits_rows(plan: Plan) -> dict[str, list[float]]:
    return {
        "keys": [site.key.stored_bits(site.key_dim) for site in plan.sites],
        "values": [site.value.stored_bits(site.value_dim) for site in plan.sites],
    }


def relative(*rows: Sequence[float]) -> list[list[float]]:
    """log10 of each number's share of the highest, SMALLEST at least."""
    highest = max([number for row in rows for number in row if number > 0], default=1.0)
    return [[math.log10(max(number / highest, SMALLEST) if number > 0 else SMALLEST) for number in row] for row in rows]


def _plot_family(axes: Any, family: str, members: Sequence[Result], index: int, edge: float) -> None:
    shown, marker = [min(member.perplexity, edge) for member in members], MARKERS[index % len(MARKERS)]
    (line,) = axes.plot([member.stored_bits for member in members], shown, marker=marker, label=family)
    for member, height in zip(members, shown, strict=True):
        if member.perplexity > edge:
            axes.annotate(
                f"{member.perplexity:.0f} ↑", (member.stored_bits, height), xytext=(5, -LINE_POINTS * (index + 1)),
                textcoords="offset points", color=line.get_color(), fontsize="small",
            )  # fmt: skip


def family_of(result: Result) -> str:
    """A configuration's name begins with its policy or baseline; what tells its members apart follows a comma. Exact
    chunks make another family.
    """
    first, *others = result.configuration.split(", ")
    return f"{first}, {EXACT_CHUNKS}" if EXACT_CHUNKS in others else first


def _stored_bits(result: Result) -> float:
    return result.stored_bits


def _heat_map(axes: Any, rows: Mapping[str, Sequence[float]], colours: str) -> Any:
    axes.set_yticks(range(len(rows)), list(rows), fontsize="small")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return axes.imshow(list(rows.values()), aspect="auto", cmap=colours)


def _write_in_cells(axes: Any, rows: Sequence[Sequence[float]]) -> None:
    """Write the number of each cell into it, legibly on a colour that goes with the number's logarithm."""
    numbers = [number for row in rows for number in row]
    middle = math.sqrt(min(numbers) * max(numbers))
    for line, row in enumerate(rows):
        for column, number in enumerate(row):
            colour = "white" if number > middle else "black"
            axes.text(column, line, f"{number:.2g}", ha="center", va="center", fontsize="x-small", color=colour)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of this many inches, and its axes in an array."""
    from matplotlib.figure import Figure  # an optional dependency

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options).flatten()


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
