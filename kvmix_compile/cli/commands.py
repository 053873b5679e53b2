"""The command line, `kvmix`: plan, report, generate, serve, eval and doctor."""

from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers import TextStreamer
from typer.core import TyperGroup

from kvmix_compile.cli.evaluate import evaluate
from kvmix_compile.cli.loading import LoadedModel, load_model, read_text
from kvmix_compile.cli.options import CalibrationFile, ModelName, analyze_on
from kvmix_compile.cli.picture import plan_picture
from kvmix_compile.cli.prompts import chat_prompt
from kvmix_compile.cli.report import show_report
from kvmix_compile.cli.serve import check_server, serve_model
from kvmix_compile.cli.tables import CacheSize, sites_table, times
from kvmix_compile.compiler import apply, diagnose
from kvmix_compile.config import DEFAULT_BUDGET, Config
from kvmix_compile.errors import InputError, KVMixError
from kvmix_compile.evaluate.records import PACKAGES, check_writable
from kvmix_compile.runtime.cache import KVMixCache
from kvmix_compile.runtime.model import CompiledModel


class _Commands(TyperGroup):
    """Shows what the user can put right as a message, and keeps tracebacks for what nobody foresaw."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KVMixError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PolicyName = Annotated[str, typer.Option(help="How bits are allocated: fisher, kvmix (the paper's) or uniform.")]
Context = Annotated[
    int | None, typer.Option(help="Tokens of the texts that the budget is for (default: MODEL's, 8192 at most).")
]
Budget = Annotated[float | None, typer.Option(help=f"Mean code bits per cached element (default {DEFAULT_BUDGET}).")]
StorageBudget = Annotated[
    float | None, typer.Option(help="Instead, mean stored bits: scales and zero points counted too.")
]
SavedPlan = Annotated[Path | None, typer.Option(help="A plan that `kvmix plan` saved.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(", ".join(f"{package.replace('-', '_')} {version(package)}" for package in PACKAGES))
        raise typer.Exit


@app.callback()
def kvmix(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Quantizes the KV cache of unmodified causal language models, layer by layer, to a bit budget."""


@app.command()
def doctor(name: ModelName) -> None:
    """What is found in MODEL, layer by layer, and why anything is not. Exits with 1 where it cannot be compiled."""
    report = diagnose(load_model(name).model)
    console = Console()
    console.print(sites_table(report))
    for refusal in report.refused:
        console.print(f"refused: {refusal.layer}: {refusal.reason}", style="red", markup=False)
    if report.verified is not None:
        console.print(f"verified: in chunks, the logits differ by {report.verified:.1e} of their standard deviation")
    console.print(times(report))
    if report.problem is not None:
        typer.echo(f"problem: {report.problem}", err=True)
        raise typer.Exit(1)
    console.print("MODEL can be compiled")


@app.command("plan")
def make_plan(
    name: ModelName,
    budget: Budget = None,
    storage_budget: StorageBudget = None,
    policy: PolicyName = Config.policy,
    context: Context = None,
    calibration: CalibrationFile = None,
    output: Annotated[Path | None, typer.Option(help="Where to save the plan, as JSON.")] = None,
) -> None:
    """Measure what matters in MODEL, spend a budget of bits, and show the plan."""
    start = perf_counter()
    config = Config(budget=budget, storage_budget=storage_budget, policy=policy, context=context).checked()  # type: ignore[arg-type]
    if output is not None:
        check_writable(output)
    importance = analyze_on(load_model(name), calibration)
    plan = config.allocate(importance)
    console = Console()
    console.print(plan_picture(plan))
    console.print(f"measured on {importance.tokens} tokens in {perf_counter() - start:.1f} s")
    if output is not None:
        plan.save(output)
        console.print(f"saved to {output}")


@app.command()
def report(
    name: ModelName,
    plan: SavedPlan = None,
    budget: Budget = None,
    storage_budget: StorageBudget = None,
    policy: PolicyName = Config.policy,
    context: Context = None,
    calibration: CalibrationFile = None,
    html: Annotated[Path | None, typer.Option(help="Write it to this file as a page for a browser.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="What `kvmix eval --json` wrote, to show on that page.")
    ] = None,
) -> None:
    """All that is found out about MODEL, the plan for a budget and what it is predicted to lose, as text or a page.

    Exits with 1 where MODEL cannot be compiled.
    """
    asked = Config(plan=plan, budget=budget, storage_budget=storage_budget, policy=policy, context=context)  # type: ignore[arg-type]
    if show_report(name, asked, calibration, html, evaluation).problem is not None:
        raise typer.Exit(1)


@app.command()
def generate(
    name: ModelName,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Instead, a file that holds the prompt.")] = None,
    plan: SavedPlan = None,
    budget: Budget = None,
    storage_budget: StorageBudget = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to write.")] = 256,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the tokenizer's chat template, if it has one.")] = True,
) -> None:
    """Stream what MODEL writes with a compressed cache, greedily; then, on standard error, the size of that cache."""
    text = _prompt(prompt, prompt_file)
    asked = Config(plan=plan, budget=budget, storage_budget=storage_budget)
    asked.checked()
    loaded = load_model(name)
    tokenizer = loaded.require_tokenizer()
    wrapped = chat and bool(tokenizer.chat_template)  # a template writes its own special tokens
    text = chat_prompt(tokenizer, text) if wrapped else text
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not wrapped)["input_ids"]
    model = _compressed(loaded, asked)
    cache = KVMixCache(model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(
        ids, cache=cache, streamer=streamer, max_new_tokens=max_new_tokens, do_sample=False,
    )  # fmt: skip
    typer.echo(str(CacheSize.of(cache)), err=True)


@app.command()
def serve(
    name: ModelName,
    plan: SavedPlan = None,
    budget: Budget = None,
    storage_budget: StorageBudget = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8000,
) -> None:
    """Answer OpenAI's clients (/v1/chat/completions, /v1/completions) and a page in a browser, each request with a
    compressed cache.

    The server is transformers'. It generates for one request at a time.
    """
    check_server()
    asked = Config(plan=plan, budget=budget, storage_budget=storage_budget)
    asked.checked()
    loaded = load_model(name)
    tokenizer = loaded.require_tokenizer()
    model = _compressed(loaded, asked)
    typer.echo(f"{name} answers at http://{host}:{port}/v1, and at http://{host}:{port} in a browser", err=True)
    serve_model(model, tokenizer, name, host, port)


def _compressed(loaded: LoadedModel, asked: Config) -> Any:
    """The model compressed as asked for; one that was saved compressed, where nothing is asked for, as it is."""
    if isinstance(loaded.model, CompiledModel) and asked == Config():
        return loaded.model
    return apply(
        loaded.model, plan=asked.plan, budget=asked.budget, storage_budget=asked.storage_budget,
        tokenizer=loaded.tokenizer, progress=True,
    )  # fmt: skip


app.command("eval")(evaluate)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise InputError("give a prompt: either --prompt with a text, or --prompt-file with a file")
    text = prompt if prompt is not None else read_text(Path(str(prompt_file)))
    if not text.strip():
        raise InputError("the prompt is empty: give a text to go on from")
    return text
