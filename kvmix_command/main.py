"""The commands, `kvmix doctor`, `fit`, `plan`, `report`, `generate`, `chat`, `serve` and `eval`: what each takes and
says.

The body of a command is what can be checked before anything is imported. What it does is a function of the same name
and with the same parameters, in kvmix_compile.cli.
"""

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvmix_command.known import (
    BASELINES,
    CACHE_FORMATS,
    DEFAULT_POLICY,
    DTYPES,
    ENGINES,
    MOST_LOSS,
    PACKAGES,
    PASSKEY_LENGTH,
    POLICIES,
    TASK_LENGTH,
    TASK_QUESTIONS,
    TASKS,
    TOKENS,
)
from kvmix_command.launched import check_one_process, first_one_speaks
from kvmix_command.options import (
    Budget,
    CalibrationFile,
    Context,
    JsonFile,
    ModelName,
    NewTokens,
    PolicyName,
    SavedPlan,
    StorageBudget,
    check_one_of,
    choice,
    memory_bytes,
    models_and_folders,
    writable,
)


class _Commands(TyperGroup):
    """Shows what the user can put right as a message, and keeps tracebacks for what nobody foresaw."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            # Whoever raised a KVMixError has imported it.
            errors = sys.modules.get("kvmix_compile.errors")
            if errors is None or not isinstance(error, errors.KVMixError):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False)


def done_by(module: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose body checks what it is given, and which the function of its name in `module` then does."""

    def decorated(declared: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(declared)
        def command(**given: Any) -> None:
            declared(**given)
            with first_one_speaks():
                getattr(import_module(module), declared.__name__)(**given)

        command.done_by = module  # type: ignore[attr-defined]  # for the test that holds the two together
        return command

    return decorated


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
@done_by("kvmix_compile.cli.doctor")
def doctor(name: ModelName, json_file: JsonFile = None) -> None:
    """What is found in MODEL, layer by layer, and why anything is not. Exits with 1 where it cannot be compiled."""


@app.command()
@done_by("kvmix_compile.cli.fit")
def fit(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A config.json, a folder with one, a name that transformers knows, or one of the models zoo: of a "
            "model nothing is loaded but its configuration.",
            autocompletion=models_and_folders,
        ),
    ],
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens in each row of the cache (default: as many as MODEL takes).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the cache: texts at a time.")] = 1,
    devices: Annotated[int, typer.Option(min=1, help="Devices among which transformers divides MODEL.")] = 1,
    memory: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE", parser=memory_bytes,
            help="Of each device, such as 80GB or 80GiB: then also the largest batch and context that fit.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, choice("--dtype", DTYPES, "Of MODEL's weights and keys and values (default: as it is kept)")
    ] = None,
    json_file: JsonFile = None,
) -> None:  # fmt: skip
    """How large MODEL's cache is at 16 bits, at fp8 and at several budgets, and how many tokens fit; on paper."""


@app.command("plan")
@done_by("kvmix_compile.cli.plan")
def make_plan(
    name: ModelName,
    budget: Budget = None,
    storage_budget: StorageBudget = None,
    policy: PolicyName = DEFAULT_POLICY,
    context: Context = None,
    calibration: CalibrationFile = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "--json", metavar="FILE", allow_dash=True, dir_okay=False, writable=True, callback=writable,
            help="Where to save the plan, as JSON; - is standard output, where then nothing else goes.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        choice("--for", ENGINES, "Instead, which layers a serving engine may keep in a format of its own", "engine"),
    ] = None,
    formats: Annotated[
        list[str] | None, choice("--format", CACHE_FORMATS, "With --for (default fp8); may be repeated")
    ] = None,
    most_loss: Annotated[
        float | None,
        typer.Option(
            min=0,
            help=f"With --for, instead of a budget: nats a token that may be lost in all (default {MOST_LOSS:g}).",
        ),
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="With --for: a checkpoint that has scales, not scales of 1.")
    ] = False,
    exported: Annotated[
        Path | None,
        typer.Option(
            exists=True, readable=True,
            help="With --for: the hf_quant_config.json of a checkpoint, which has chosen; nothing is measured.",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Measure what matters in MODEL, spend a budget of bits, and show the plan."""
    check_one_of(
        ("--budget", budget), ("--storage-budget", storage_budget), ("--most-loss", most_loss), ("--exported", exported)
    )
    of_engines = (
        ("--format", formats or None), ("--most-loss", most_loss), ("--calibrated", calibrated or None),
        ("--exported", exported),
    )  # fmt: skip
    given = [option for option, value in of_engines if value is not None]
    if engine is None and given:
        raise typer.BadParameter(f"{given[0]} is about a serving engine: say with --for which one")
    if engine is None:
        return
    check_one_process("plan --for")
    if policy != DEFAULT_POLICY:
        raise typer.BadParameter("--policy is about this project's own cache: leave it out, or --for")
    if exported is not None and (calibration or calibrated or formats):
        raise typer.BadParameter("--exported has chosen already: leave out --format, --calibrated and --calibration")


@app.command()
@done_by("kvmix_compile.cli.report")
def report(
    name: ModelName,
    plan: SavedPlan = None,
    budget: Budget = None,
    storage_budget: StorageBudget = None,
    policy: PolicyName = DEFAULT_POLICY,
    context: Context = None,
    calibration: CalibrationFile = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", dir_okay=False, writable=True, callback=writable,
            help="Write it to this file as a page for a browser.",
        ),
    ] = None,
    evaluation_file: Annotated[
        Path | None,
        typer.Option(
            "--eval", exists=True, dir_okay=False, readable=True,
            help="What `kvmix eval --json` wrote, to show on that page.",
        ),
    ] = None,
) -> None:  # fmt: skip
    """All that is found out about MODEL, the plan for a budget and what it is predicted to lose, as text or a page.

    Exits with 1 where MODEL cannot be compiled.
    """
    check_one_of(("--plan", plan), ("--budget", budget), ("--storage-budget", storage_budget))
    if evaluation_file is not None and html is None:
        raise typer.BadParameter("--eval is shown on the page: say with --html where to write it")


@app.command()
@done_by("kvmix_compile.cli.generate")
def generate(
    name: ModelName,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, readable=True, help="Instead, a file that holds the prompt."),
    ] = None,
    plan: SavedPlan = None,
    budget: Budget = None,
    storage_budget: StorageBudget = None,
    max_new_tokens: NewTokens = 256,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the tokenizer's chat template, if it has one.")] = True,
    json_file: JsonFile = None,
) -> None:
    """Stream what MODEL writes with a compressed cache, greedily; then, on standard error, the size of that cache."""
    check_one_of(("--plan", plan), ("--budget", budget), ("--storage-budget", storage_budget))
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give a prompt: either --prompt with a text, or --prompt-file with a file")
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("the prompt is empty: give a text to go on from")


@app.command()
@done_by("kvmix_compile.cli.chat")
def chat(
    name: ModelName,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    plan: SavedPlan = None,
    budget: Budget = None,
    storage_budget: StorageBudget = None,
    max_new_tokens: NewTokens = 512,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: always the likeliest token; else drawn, and the higher the freer.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="What is drawn begins with it.")] = 0,
) -> None:
    """Talk to MODEL: one compressed cache for the whole conversation, of which each turn reads only what is new."""
    check_one_of(("--plan", plan), ("--budget", budget), ("--storage-budget", storage_budget))


@app.command()
@done_by("kvmix_compile.cli.serve")
def serve(
    name: ModelName,
    plan: SavedPlan = None,
    budget: Budget = None,
    storage_budget: StorageBudget = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on.")] = 8000,
) -> None:
    """Answer OpenAI's clients (/v1/chat/completions, /v1/completions), each request with a compressed cache.

    The server is transformers'. It generates for one request at a time.
    """
    check_one_process("serve")
    check_one_of(("--plan", plan), ("--budget", budget), ("--storage-budget", storage_budget))


@app.command("eval")
@done_by("kvmix_compile.cli.evaluate")
def evaluate(
    name: ModelName,
    quick: Annotated[bool, typer.Option("--quick", help="A first look, in minutes.")] = False,
    everything: Annotated[bool, typer.Option("--everything", help="All that follows, a little of each.")] = False,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--text", exists=True, dir_okay=False, readable=True,
            help="Text to evaluate on; may be repeated. Else built-in English that calibration does not see.",
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help=f"How many tokens of each text (default {TOKENS}).")
    ] = None,
    budgets: Annotated[
        list[float] | None, typer.Option("--budget", help="Mean code bits; may be repeated.")
    ] = None,
    storage_budgets: Annotated[
        list[float] | None,
        typer.Option("--storage-budget", help="Mean stored bits, scales and zero points counted too; may be repeated."),
    ] = None,
    plan_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--plan", exists=True, dir_okay=False, readable=True,
            help="A plan that `kvmix plan` saved; may be repeated.",
        ),
    ] = None,
    policies: Annotated[
        list[str] | None,
        choice("--policy", POLICIES, f"At every budget (default {DEFAULT_POLICY}); may be repeated"),
    ] = None,
    exact_chunks: Annotated[
        bool | None, typer.Option("--exact-chunks", help="Each budget also with exact_chunks=True.")
    ] = None,
    baselines: Annotated[
        list[str] | None, choice("--baseline", BASELINES, "To compare with; may be repeated")
    ] = None,
    decode: Annotated[
        int | None, typer.Option(min=0, help="Also texts of so many tokens that MODEL itself writes, read one by one.")
    ] = None,
    writing: Annotated[
        int | None, typer.Option(min=0, help="Also up to so many tokens that each configuration writes by itself.")
    ] = None,
    ways: Annotated[
        int | None, typer.Option(min=0, help="Also a text of so many tokens that comes in several ways.")
    ] = None,
    drafts: Annotated[
        bool | None, typer.Option("--drafts", help="Also assisted generation, and the time of its steps.")
    ] = None,
    passkey: Annotated[bool, typer.Option("--passkey", help="Also hide a number in a text and ask for it.")] = False,
    passkey_lengths: Annotated[
        list[int] | None,
        typer.Option("--passkey-length", help=f"Tokens of text (default {PASSKEY_LENGTH}); may be repeated."),
    ] = None,
    passkey_depths: Annotated[
        list[float] | None,
        typer.Option("--passkey-depth", help="Where the key is, from 0 to 1 (default 0.1 to 0.9); may be repeated."),
    ] = None,
    tasks: Annotated[
        list[str] | None, choice("--task", (*TASKS, "all"), "Questions on made texts; may be repeated")
    ] = None,
    task_lengths: Annotated[
        list[int] | None,
        typer.Option("--task-length", help=f"Tokens of text (default {TASK_LENGTH}); may be repeated."),
    ] = None,
    task_questions: Annotated[
        int | None, typer.Option(min=1, help=f"Of each task and length (default {TASK_QUESTIONS}).")
    ] = None,
    calibration: CalibrationFile = None,
    json_file: JsonFile = None,
    plots: Annotated[Path | None, typer.Option(help="A folder for plots: frontier, divergences, layers.")] = None,
) -> None:  # fmt: skip
    """Bits against predictions, through the cache: of MODEL as it is, at each budget or plan, and of baselines."""
    check_one_of(("--quick", quick), ("--everything", everything))
