"""Draws what the benchmarks measured: `python -m benchmarks.plots [--output FOLDER]`.

For each device with results: attend's speed-up over 16-bit attention, and the tokens a second of whole models.
"""

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
DOTS_PER_INCH = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=IMAGES)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name, draw in (("attention", attention), ("decode", decode)):
        for path in sorted(RESULTS.glob(f"{name}-*.json")):
            image = options.output / f"{path.stem}.png"
            draw(json.loads(path.read_text())).savefig(image, dpi=DOTS_PER_INCH)
            print(image)


def attention(record: dict[str, Any]) -> Figure:
    """Speed-up against tokens held, a diagram for each number of rows, a line for each precision, and a dashed one for
    each of the others that quantize keys and values.
    """
    rows = [row for row in record["results"] if row["speedup"]]
    batches = [(batch, list(members)) for batch, members in groupby(rows, key=lambda row: row["batch"])]
    figure = Figure(figsize=(5 * len(batches), 4), layout="constrained")
    for axes, (batch, members) in zip(
        figure.subplots(1, len(batches), squeeze=False, sharey=True)[0], batches, strict=True
    ):
        for bits in dict.fromkeys((row["key_bits"], row["value_bits"]) for row in members):
            line = [row for row in members if (row["key_bits"], row["value_bits"]) == bits]
            label = f"keys {bits[0]}, values {bits[1]} bits"
            axes.plot([row["tokens"] for row in line], [row["speedup"] for row in line], marker="o", label=label)
        # With each precision the others were timed again; the last is drawn, whose line is the one above.
        for name in dict.fromkeys(name for row in line for name in row.get("quantized_seconds", ())):
            timed = [row for row in line if name in row["quantized_seconds"]]
            ratios = [min(row["baseline_seconds"].values()) / row["quantized_seconds"][name] for row in timed]
            axes.plot([row["tokens"] for row in timed], ratios, marker="x", linestyle="--", label=name)
        axes.axhline(1, color="black", linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens in the cache")
        axes.set_title(f"{batch} row{'s' * (batch > 1)}, {record['device']}", fontsize="medium")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.supylabel("against the fastest unquantized attention", fontsize="medium")
    return figure


def decode(record: dict[str, Any]) -> Figure:
    """Tokens a second, a group of bars for each context."""
    contexts = [(context, list(rows)) for context, rows in groupby(record["results"], key=lambda row: row["context"])]
    figure = Figure(figsize=(4 * len(contexts), 4), layout="constrained")
    for axes, (context, rows) in zip(figure.subplots(1, len(contexts), squeeze=False)[0], contexts, strict=True):
        bars = axes.bar([row["cache"] for row in rows], [row["tokens_per_second"] for row in rows])
        axes.bar_label(bars, [f"{row['speedup_over_dynamic']:.2f}x" for row in rows], fontsize="small")
        axes.tick_params(axis="x", rotation=45)
        axes.set_title(f"{context} tokens, {record['device']}", fontsize="medium")
    weights = f", {record['weights']} weights" if record.get("weights", "unquantized") != "unquantized" else ""
    figure.supylabel(f"tokens a second, {record['dtype']}{weights}", fontsize="medium")
    return figure


if __name__ == "__main__":
    main()
