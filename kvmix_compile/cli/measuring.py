"""What commands measure a model on, and how they compress it."""

from pathlib import Path
from typing import Any

import typer
from torch import Tensor

from kvmix_compile.calibration import build_calibration
from kvmix_compile.cli.loading import LoadedModel, read_text
from kvmix_compile.compiler import CALIBRATION_LENGTH, analyze, apply
from kvmix_compile.config import Config
from kvmix_compile.passes.measure.importance import Importance
from kvmix_compile.runtime.model import CompiledModel


def calibration_rows(loaded: LoadedModel, calibration: Path | None) -> list[Tensor]:
    """The token ids that `analyze_on` measures on, int64 `[tokens]` each."""
    text = read_text(calibration) if calibration else None
    chosen = build_calibration(loaded.model, loaded.tokenizer, text, length=CALIBRATION_LENGTH)
    return list(chosen.rows)


def analyze_on(loaded: LoadedModel, calibration: Path | None) -> Importance:
    """The importance of a model's layers on the text of a file, else on what calibration does by default."""
    text = read_text(calibration) if calibration else None
    return analyze(loaded.model, tokenizer=loaded.tokenizer, calibration=text, progress=True)


def compressed(loaded: LoadedModel, asked: Config) -> Any:
    """The model compressed as asked for; one that was saved compressed, where nothing is asked for, as it is."""
    if isinstance(loaded.model, CompiledModel) and asked == Config():
        return loaded.model
    if asked.plan is None:
        typer.echo(
            "measuring what matters in the model; --plan, with a plan that `kvmix plan` saved, spares this", err=True
        )
    return apply(
        loaded.model, plan=asked.plan, budget=asked.budget, storage_budget=asked.storage_budget,
        tokenizer=loaded.tokenizer, progress=True,
    )  # fmt: skip
