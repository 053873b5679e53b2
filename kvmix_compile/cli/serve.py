"""kvmix serve: transformers' own server, whose every request one compressed model answers, and a page to talk to it."""

from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import typer
from torch import nn
from transformers.utils.import_utils import is_serve_available

from kvmix_compile.cli.loading import load_model
from kvmix_compile.cli.measuring import compressed
from kvmix_compile.cli.watch import Watched
from kvmix_compile.config import Config
from kvmix_compile.errors import InputError

PAGE = "chat.html"


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
    """Serve `model` by `name`, with transformers' endpoints for OpenAI's clients, a page at / and what the cache holds
    at /kvmix/cache; until it is interrupted, or, without `wait`, in a thread of its own. Returns transformers' Serve.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    watched = Watched(model)

    class OneModel(model_manager.ModelManager):
        """Loads nothing: there is a model."""

        def load_model_and_processor(self, *arguments: Any, **options: Any) -> Any:
            return watched.model, tokenizer

    class ServeWithPage(Serve):
        """Adds the page before it starts."""

        def start_server(self) -> None:
            _add_page(self.server.config.app, watched, name, bool(getattr(tokenizer, "chat_template", None)))
            if wait:
                self.server.run()
            else:
                super().start_server()

    # Serve makes its manager itself, of the class that it finds by this name.
    loading, model_manager.ModelManager = model_manager.ModelManager, OneModel  # type: ignore[misc]
    try:
        # Not blocking, it leaves starting to `start_server`.
        return ServeWithPage(force_model=name, host=host, port=port, non_blocking=True)
    finally:
        model_manager.ModelManager = loading  # type: ignore[misc]


def _add_page(app: Any, watched: Watched, name: str, chats: bool) -> None:
    """Give a FastAPI application the two routes of the page."""
    from fastapi.responses import HTMLResponse

    page = files("kvmix_compile.cli").joinpath(PAGE).read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    def talk() -> str:
        return page

    @app.get("/kvmix/cache")
    def cache() -> dict[str, Any]:
        about = {"model": name, "chats": chats, "generating": watched.is_generating}
        return about | asdict(watched.held())
