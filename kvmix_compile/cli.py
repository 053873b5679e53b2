"""The command line, `kvmix`: plan, generate, eval and doctor."""

import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import TextStreamer
from typer.core import TyperGroup

from kvmix_compile.cache import KVMixCache
from kvmix_compile.compiler import DEFAULT_BUDGET, analyze, apply, diagnose
from kvmix_compile.errors import InputError, KVMixError
from kvmix_compile.evaluation import CHUNK, WINDOW, perplexity
from kvmix_compile.held_out import held_out_english, token_ids
from kvmix_compile.loading import NAMES, LoadedModel, load_model, read_text
from kvmix_compile.passes.importance import Importance
from kvmix_compile.picture import plan_picture
from kvmix_compile.prompts import chat_prompt
from kvmix_compile.tables import CacheSize, Evaluated, perplexity_table, sites_table, times


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
    help="Quantizes the KV cache of unmodified causal language models, layer by layer, to a bit budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help=f"A folder or name that transformers knows, or one of: {', '.join(NAMES)}."),
]
PolicyName = Annotated[str, typer.Option(help="How bits are allocated: fisher, kvmix (the paper's) or uniform.")]
Budget = Annotated[float | None, typer.Option(help=f"Mean code bits per cached element (default {DEFAULT_BUDGET}).")]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calibration", help="Text to measure importance on; else built-in English.")
]


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
    storage_budget: Annotated[
        float | None, typer.Option(help="Instead, mean stored bits: scales and zero points counted too.")
    ] = None,
    policy: PolicyName = "fisher",
    calibration: CalibrationFile = None,
    output: Annotated[Path | None, typer.Option(help="Where to save the plan, as JSON.")] = None,
) -> None:
    """Measure what matters in MODEL, spend a budget of bits, and show the plan."""
    start = perf_counter()
    importance = _analyze(load_model(name), calibration)
    if budget is None and storage_budget is None:
        budget = DEFAULT_BUDGET
    plan = importance.allocate(budget=budget, storage_budget=storage_budget, policy=policy)  # type: ignore[arg-type]
    console = Console()
    console.print(plan_picture(plan))
    console.print(f"measured on {importance.tokens} tokens in {perf_counter() - start:.1f} s")
    if output is not None:
        plan.save(output)
        console.print(f"saved to {output}")


@app.command()
def generate(
    name: ModelName,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Instead, a file that holds the prompt.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan that `kvmix plan` saved.")] = None,
    budget: Budget = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to write.")] = 256,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the tokenizer's chat template, if it has one.")] = True,
) -> None:
    """Stream what MODEL writes with a compressed cache, greedily; then, on standard error, the size of that cache."""
    loaded = load_model(name)
    tokenizer = loaded.require_tokenizer()
    text = _prompt(prompt, prompt_file)
    model: Any = apply(loaded.model, plan=plan, budget=budget, tokenizer=tokenizer, progress=True)
    wrapped = chat and bool(tokenizer.chat_template)  # a template writes its own special tokens
    text = chat_prompt(tokenizer, text) if wrapped else text
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not wrapped)["input_ids"]
    cache = KVMixCache(model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(
        ids, past_key_values=cache, streamer=streamer, max_new_tokens=max_new_tokens, do_sample=False,
    )  # fmt: skip
    typer.echo(str(CacheSize.of(cache)), err=True)


@app.command("eval")
def evaluate(
    name: ModelName,
    text: Annotated[
        Path | None, typer.Option(help="Text to evaluate on; else built-in English that calibration does not see.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of it.")] = 4096,
    budget: Annotated[list[float] | None, typer.Option(help="Mean code bits; give it once for each plan.")] = None,
    policy: PolicyName = "fisher",
    calibration: CalibrationFile = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers as JSON.")] = None,
) -> None:
    """Perplexity through the cache: of MODEL as it is, and at each budget."""
    loaded = load_model(name)
    passage = read_text(text) if text else "\n\n".join(held_out_english())
    ids = token_ids(loaded.require_tokenizer(), passage, tokens)
    importance = _analyze(loaded, calibration)
    rows = [Evaluated.original(perplexity(loaded.model, ids, progress=True))]
    for bits in budget or [DEFAULT_BUDGET]:
        plan = importance.allocate(budget=bits, policy=policy)  # type: ignore[arg-type]
        model = apply(loaded.model, plan=plan)
        rows.append(Evaluated.compressed(f"{policy}, budget {bits:g}", plan, perplexity(model, ids, progress=True)))
    source = str(text) if text else "built-in English, held out"
    title = f"{name}, {len(ids)} tokens ({source}) in windows of {WINDOW}, read in chunks of {CHUNK}"
    Console().print(perplexity_table(rows, title))
    if json_file is not None:
        record = {"model": name, "text": source, "tokens": len(ids), "window": WINDOW, "chunk": CHUNK}
        _write_json(json_file, record | {"results": [asdict(row) for row in rows]} | _circumstances())


def _analyze(loaded: LoadedModel, calibration: Path | None) -> Importance:
    text = read_text(calibration) if calibration else None
    return analyze(loaded.model, tokenizer=loaded.tokenizer, calibration=text, progress=True)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise InputError("give a prompt: either --prompt with a text, or --prompt-file with a file")
    return prompt if prompt is not None else read_text(Path(str(prompt_file)))


def _write_json(path: Path, record: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _circumstances() -> dict[str, Any]:
    """On what, with what and how the numbers were made."""
    packages = ("kvmix-compile", "torch", "transformers")
    return {
        "device": f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "command": ["kvmix", *sys.argv[1:]],
    }
