"""What several commands of `kvmix` take, and what they do with it."""

from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from kvmix_compile.calibration import build_calibration
from kvmix_compile.cli.loading import NAMES, LoadedModel, read_text
from kvmix_compile.compiler import CALIBRATION_LENGTH, analyze
from kvmix_compile.passes.measure.importance import Importance

ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help=f"A folder or name that transformers knows, or one of: {', '.join(NAMES)}."),
]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calibration", help="Text to measure importance on; else built-in English.")
]


def calibration_rows(loaded: LoadedModel, calibration: Path | None) -> list[Tensor]:
    """The token ids that `analyze_on` measures on, int64 `[tokens]` each."""
    text = read_text(calibration) if calibration else None
    chosen = build_calibration(loaded.model, loaded.tokenizer, text, length=CALIBRATION_LENGTH)
    return list(chosen.rows)


def analyze_on(loaded: LoadedModel, calibration: Path | None) -> Importance:
    """The importance of a model's layers on the text of a file, else on what calibration does by default."""
    text = read_text(calibration) if calibration else None
    return analyze(loaded.model, tokenizer=loaded.tokenizer, calibration=text, progress=True)
