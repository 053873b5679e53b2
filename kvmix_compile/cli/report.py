"""`kvmix report`: all that is found out about a model, as a text or as a page."""

from dataclasses import replace
from pathlib import Path

import typer

from kvmix_command.launched import is_first
from kvmix_compile.cli.loading import load_model, read_text
from kvmix_compile.cli.page import page
from kvmix_compile.compiler import examine
from kvmix_compile.config import Config
from kvmix_compile.errors import InputError
from kvmix_compile.evaluate.records import Evaluation, read_evaluation
from kvmix_compile.passes.files import replacing
from kvmix_compile.report import Report


def report(
    name: str,
    plan: Path | None,
    budget: float | None,
    storage_budget: float | None,
    policy: str,
    context: int | None,
    calibration: Path | None,
    html: Path | None,
    evaluation_file: Path | None,
) -> None:
    """Print what a plan would make of the model, or write it to `html` as a page. Its frontier is that of
    `evaluation_file`, which `kvmix eval --json` wrote, beside the predicted one. Exits with 1 where there is none.
    """
    config = Config(plan=plan, budget=budget, storage_budget=storage_budget, policy=policy, context=context).checked()  # type: ignore[arg-type]
    evaluation = read_evaluation(evaluation_file) if evaluation_file else None
    text = read_text(calibration) if calibration else None
    loaded = load_model(name)
    config = replace(config, tokenizer=loaded.tokenizer, calibration=text).checked()
    found, examined = examine(loaded.model, config, progress=True)
    if html is None:
        typer.echo(str(found))
    else:
        if examined is not None and evaluation is not None:
            _check_same_model(name, evaluation, found)
        if is_first():
            _write(html, page(name, found, examined, evaluation))
        typer.echo(f"saved to {html}")
    if found.problem is not None:
        raise typer.Exit(1)


def _check_same_model(name: str, evaluation: Evaluation, report: Report) -> None:
    if evaluation.layers != tuple(site.layer for site in report.sites):
        raise InputError(
            f"the evaluation is of {evaluation.model}, whose attention sites are not those of {name}: evaluate {name}"
        )


def _write(path: Path, text: str) -> None:
    try:
        with replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
