"""What several commands of `kvmix` take, and what they do with it."""

from pathlib import Path
from typing import Annotated

import typer

from kvmix_compile.cli.loading import NAMES, LoadedModel, read_text
from kvmix_compile.compiler import analyze
from kvmix_compile.passes.measure.importance import Importance

ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help=f"A folder or name that transformers knows, or one of: {', '.join(NAMES)}."),
]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calibration", help="Text to measure importance on; else built-in English.")
]


def analyze_on(loaded: LoadedModel, calibration: Path | None) -> Importance:
    """The importance of a model's layers on the text of a file, else on what calibration does by default."""
    text = read_text(calibration) if calibration else None
    return analyze(loaded.model, tokenizer=loaded.tokenizer, calibration=text, progress=True)
