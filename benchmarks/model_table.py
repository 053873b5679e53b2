"""The results of benchmarks.models as a page of documentation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

MEASURED = ("sites", "masks", "difference when rewritten", "padded", "16 bits", "2.3 bits", "bytes a token", "backend")
REASONS = {
    "Refused by `apply`": "refusal",
    "Refused by the backend": "backend_refusal",
    "Without `StaticCache` in transformers": "static_cache",
    "Not run": "not_run",
}

HEADER = """# Models

Made by `python -m benchmarks.models` with {versions} on {device}; do not edit. Every architecture that transformers
maps to a causal language model is made at toy size with random weights, by rules that name none of them, and tried in a
process of its own. It reads two rows of 150 tokens, one of them padded on the left where the model takes positions, and
generates 16 tokens; 4 sinks and 32 recent tokens stay unquantized, so that most is read from storage. Of {run} that
generate text from ids:

- **{applied}** work through `apply`: verified, with 16 bits the original's greedy text, with 2.3 bits finite logits;
- **{compiled}** work through `torch.compile(backend="kvmix")` and a `StaticCache`: with 16 bits the original's text;
- **{either}** work in one of the two ways. `apply` refuses {refused}, the backend {backend_refused}, each before
  anything is changed and with the reason given below; {no_static} do not run compiled with a `StaticCache` themselves;
- **{failed}** failed otherwise.

Bytes a token: what one takes at 2.3 bits once it is packed, of what it takes in the model's own cache, which here is in
float32. Toys have small heads, so that scales and zero points are more of it than elsewhere.
"""


def table(record: Mapping[str, Any]) -> str:
    """Markdown of what benchmarks.models wrote as JSON."""
    rows: Sequence[Row] = record["results"]
    header = HEADER.format(
        versions=" and ".join(f"{name} {record['versions'][name]}" for name in ("transformers", "torch")),
        device=record["device"],
        run=sum(not row["not_run"] for row in rows),
        applied=sum(map(applied, rows)),
        compiled=sum(row["backend"] is True for row in rows),
        either=sum(applied(row) or row["backend"] is True for row in rows),
        refused=sum(bool(row["refusal"]) for row in rows),
        backend_refused=sum(bool(row["backend_refusal"]) for row in rows),
        no_static=sum(bool(row["static_cache"]) for row in rows),
        failed=sum(map(failed, rows)),
    )
    return header + "".join(_sections(rows))


def applied(row: Row) -> bool:
    """Whether everything through `apply` is as it should be."""
    return bool(row["verified"] is not None and row["text"] and row["quantized"])


def failed(row: Row) -> bool:
    """Whether something went wrong and was not refused."""
    return bool(row["failures"]) or False in (row["text"], row["quantized"], row["backend"])


def _sections(rows: Sequence[Row]) -> Iterator[str]:
    worked = [row for row in rows if applied(row) or row["backend"]]
    yield _section("Supported", MEASURED, [[row["model_type"], *_measured(row)] for row in worked])
    for title, reason in REASONS.items():
        reasons = [[row["model_type"], _escaped(row[reason])] for row in rows if row[reason]]
        yield _section(title, ("why",), reasons)
    broken = [
        [row["model_type"], _escaped("; ".join(row["failures"]) or "another text")] for row in rows if failed(row)
    ]
    yield _section("Failed", ("what",), broken)


def _section(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""
    rule = ["---"] * (len(columns) + 1)
    listed = "".join(f"| {' | '.join(line)} |\n" for line in (("architecture", *columns), rule, *lines))
    return f"\n## {title}\n\n{listed}"


def _measured(row: Row) -> list[str]:
    difference = "" if row["verified"] is None else f"{row['verified']:.0e}"
    return [
        str(row["sites"] or ""), ", ".join(row["masks"]), difference,
        *(_answer(row[name]) for name in ("padded", "text", "quantized")), _bytes(row), _answer(row["backend"]),
    ]  # fmt: skip


def _bytes(row: Row) -> str:
    """What a token takes, and of what; empty where that was not asked."""
    packed, own = row.get("token_bytes"), row.get("own_cache_bytes")
    if packed is None:
        return ""
    return f"{packed:.0f}" if own is None else f"{packed:.0f} of {own:.0f}"


def _answer(value: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[value]


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
