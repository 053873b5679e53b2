"""kvmix serve: transformers' own server, whose every request one compressed model answers."""

from pathlib import Path
from typing import Any

import typer
from torch import nn
from transformers.utils.import_utils import is_serve_available

from kvmix_compile.cli.loading import load_model
from kvmix_compile.cli.measuring import compressed
from kvmix_compile.config import Config
from kvmix_compile.errors import InputError


def serve(
    name: str, plan: Path | None, budget: float | None, storage_budget: float | None, host: str, port: int
) -> None:
    """Answer OpenAI's clients with a compressed model, until interrupted."""
    check_server()
    asked = Config(plan=plan, budget=budget, storage_budget=storage_budget)
    asked.checked()
    loaded = load_model(name)
    tokenizer = loaded.require_tokenizer()
    model = compressed(loaded, asked)
    typer.echo(f"{name} answers at http://{host}:{port}/v1", err=True)
    serve_model(model, tokenizer, name, host, port)


def check_server() -> None:
    """Raise InputError where transformers' server cannot run."""
    if not is_serve_available():
        raise InputError("kvmix serve needs transformers' server: pip install 'kvmix-compile[serve]'")


def serve_model(model: nn.Module, tokenizer: Any, name: str, host: str, port: int, *, wait: bool = True) -> Any:
    """Serve `model` by `name`, with transformers' endpoints for OpenAI's clients; until it is interrupted, or, without
    `wait`, in a thread of its own. Returns transformers' Serve.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    class OneModel(model_manager.ModelManager):
        """Loads nothing: there is a model."""

        def load_model_and_processor(self, *arguments: Any, **options: Any) -> Any:
            return model, tokenizer

    # Serve makes its manager itself, of the class that it finds by this name.
    loading, model_manager.ModelManager = model_manager.ModelManager, OneModel  # type: ignore[misc]
    try:
        return Serve(force_model=name, host=host, port=port, non_blocking=not wait)
    finally:
        model_manager.ModelManager = loading  # type: ignore[misc]
