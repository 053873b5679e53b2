"""`kvmix doctor`: what is found in a model."""

from pathlib import Path
from typing import Any

import typer

from kvmix_compile.cli.loading import load_model
from kvmix_compile.cli.output import console_beside, write_json
from kvmix_compile.cli.tables import sites_table, times
from kvmix_compile.compiler import diagnose
from kvmix_compile.report import Report


def doctor(name: str, json_file: Path | None) -> None:
    """Show what is found in a model. Raises typer.Exit(1) where it cannot be compiled."""
    report = diagnose(load_model(name).model)
    console = console_beside(json_file)
    console.print(sites_table(report))
    for refusal in report.refused:
        console.print(f"refused: {refusal.layer}: {refusal.reason}", style="red", markup=False)
    if report.verified is not None:
        console.print(f"verified: in chunks, the logits differ by {report.verified:.1e} of their standard deviation")
    console.print(times(report))
    write_json(json_file, _record(report))
    if report.problem is not None:
        typer.echo(f"problem: {report.problem}", err=True)
        raise typer.Exit(1)
    console.print("MODEL can be compiled")


def _record(report: Report) -> dict[str, Any]:
    return {
        "model": report.model,
        "can_be_compiled": report.problem is None,
        "problem": report.problem,
        "sites": [
            {
                "layer": site.layer,
                "query_heads": site.query_heads,
                "kv_heads": site.kv_heads,
                "key_dim": site.key_dim,
                "value_dim": site.value_dim,
                "attention": site.attention,
            }
            for site in report.sites
        ],
        "refused": [{"layer": refusal.layer, "reason": refusal.reason} for refusal in report.refused],
        "verified": report.verified,
        "notes": list(report.notes),
        "seconds": report.seconds,
    }
