"""`kvmix eval`: what each way of keeping the KV cache costs in bits, and what it does to the model's predictions."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from kvmix_compile.cli.loading import LoadedModel, load_model, read_text
from kvmix_compile.cli.options import CalibrationFile, ModelName, analyze_on, calibration_rows
from kvmix_compile.cli.tables import passkey_table, results_table, scores_table
from kvmix_compile.config import DEFAULT_BUDGET
from kvmix_compile.evaluate.answering import check_positions
from kvmix_compile.evaluate.baselines import BASELINES, check_baselines, packages, published_plans, quantized_caches
from kvmix_compile.evaluate.comparison import compare
from kvmix_compile.evaluate.configurations import Configuration, compile_plans, make_plans
from kvmix_compile.evaluate.held_out import held_out_english, token_ids
from kvmix_compile.evaluate.opponents import Rotations, simulated_caches
from kvmix_compile.evaluate.passkey import DEPTHS, LENGTHS, Retrieval, hide_passkeys, retrieve
from kvmix_compile.evaluate.perplexity import windowed
from kvmix_compile.evaluate.plots import (
    DIVERGENCE_FILE,
    FRONTIER_FILE,
    LAYERS_FILE,
    check_plots,
    plot_divergence,
    plot_frontier,
    plot_layers,
)
from kvmix_compile.evaluate.puzzles import PUZZLES
from kvmix_compile.evaluate.records import TextResults, check_writable, record, write_json
from kvmix_compile.evaluate.spectral import fitted_rotations
from kvmix_compile.evaluate.tasks import LENGTHS as TASK_LENGTHS
from kvmix_compile.evaluate.tasks import QUESTIONS, Score, answerable, check_room, make_questions, solve
from kvmix_compile.evaluate.written import CHUNK as DECODED_CHUNK
from kvmix_compile.evaluate.written import written_text
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.allocate.policies import check_policy, limit
from kvmix_compile.passes.measure.importance import Importance

Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text", help="Text to evaluate on; may be repeated. Else built-in English that calibration does not see."
    ),
]
Budgets = Annotated[list[float] | None, typer.Option("--budget", help="Mean code bits; may be repeated.")]
StorageBudgets = Annotated[
    list[float] | None,
    typer.Option("--storage-budget", help="Mean stored bits, scales and zero points counted too; may be repeated."),
]
Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help="fisher (default), kvmix or uniform, at every budget; may be repeated."),
]
Baselines = Annotated[
    list[str] | None, typer.Option("--baseline", help=f"To compare with: {', '.join(BASELINES)}; may be repeated.")
]
PasskeyLengths = Annotated[
    list[int] | None, typer.Option("--passkey-length", help=f"Tokens of text (default {LENGTHS[0]}); may be repeated.")
]
PasskeyDepths = Annotated[
    list[float] | None,
    typer.Option("--passkey-depth", help="Where the key is, from 0 to 1 (default 0.1 to 0.9); may be repeated."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", help=f"Questions on made texts: {', '.join(PUZZLES)}, or all; may be repeated."),
]
TaskLengths = Annotated[
    list[int] | None,
    typer.Option("--task-length", help=f"Tokens of text (default {TASK_LENGTHS[0]}); may be repeated."),
]


def evaluate(
    name: ModelName,
    texts: Texts = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of each text.")] = 4096,
    budgets: Budgets = None,
    storage_budgets: StorageBudgets = None,
    policies: Policies = None,
    baselines: Baselines = None,
    decode: Annotated[
        int, typer.Option(min=0, help="Also texts of so many tokens that MODEL itself writes, read one by one.")
    ] = 0,
    passkey: Annotated[bool, typer.Option("--passkey", help="Also hide a number in a text and ask for it.")] = False,
    passkey_lengths: PasskeyLengths = None,
    passkey_depths: PasskeyDepths = None,
    tasks: Tasks = None,
    task_lengths: TaskLengths = None,
    task_questions: Annotated[int, typer.Option(min=1, help="Of each task and length.")] = QUESTIONS,
    calibration: CalibrationFile = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers as JSON.")] = None,
    plots: Annotated[Path | None, typer.Option(help="A folder for plots: frontier, divergences, layers.")] = None,
) -> None:
    """Bits against predictions, through the cache: of MODEL as it is, at each budget, and of baselines."""
    for policy in policies or ():
        check_policy(policy)
    for bits in (*(budgets or ()), *(storage_budgets or ())):
        limit(bits, None)
    loaded, names = load_model(name), baselines or []
    model, tokenizer = loaded.model, loaded.require_tokenizer()
    if json_file is not None:
        check_writable(json_file)
    if plots is not None:
        check_plots(plots)
    check_baselines(names, model)
    read = _texts(tokenizer, texts or [], tokens)
    asked = passkey or passkey_lengths or passkey_depths
    lengths, depths = passkey_lengths or LENGTHS, passkey_depths or DEPTHS
    passkeys = hide_passkeys(tokenizer, lengths, depths) if asked else []
    kinds = list(PUZZLES) if "all" in (tasks or ()) else tasks or []
    questions = make_questions(tokenizer, kinds, task_lengths or TASK_LENGTHS, task_questions)
    original = Configuration("original", model)
    check_room([original], questions)
    check_positions([original], decode, "the tokens to decode", "--decode")

    decoded = written_text(model, tokenizer, decode) if decode else torch.empty(0)
    importance = analyze_on(loaded, calibration)
    plans = _plans(importance, policies, budgets, storage_budgets) | published_plans(names, importance)
    rotations = partial(_rotations, loaded, calibration)
    others = [*simulated_caches(names, model, importance, rotations), *quantized_caches(names, model)]
    configurations = [original, *compile_plans(model, plans), *others]
    found = [TextResults(text, len(ids), compare(configurations, ids, progress=True)) for text, ids in read.items()]
    if decode:
        results = compare(configurations, decoded, DECODED_CHUNK, decode, progress=True)
        found.append(TextResults("written by the original", len(decoded), results, decode, DECODED_CHUNK))
    retrievals = retrieve(configurations, tokenizer, passkeys, progress=True) if passkeys else []
    scores = solve(configurations, tokenizer, questions, progress=True) if questions else []

    _show(name, found, retrievals, scores)
    if json_file is not None:
        write_json(json_file, record(name, found, retrievals, scores, importance, plans, packages(names)))
    if plots is not None:
        _plot(plots, found, importance, plans)


def _rotations(loaded: LoadedModel, calibration: Path | None) -> list[Rotations]:
    return fitted_rotations(loaded.model, calibration_rows(loaded, calibration))


def _texts(tokenizer: Any, paths: Sequence[Path], tokens: int) -> dict[str, Tensor]:
    """The ids of each text by its name. Raises InputError for one that is too short."""
    texts = {str(path): read_text(path) for path in paths}
    texts = texts or {"built-in English, held out": "\n\n".join(held_out_english())}
    read = {name: token_ids(tokenizer, text, tokens) for name, text in texts.items()}
    for ids in read.values():
        windowed(ids)
    return read


def _plot(folder: Path, texts: Sequence[TextResults], importance: Importance, plans: Mapping[str, Plan]) -> None:
    results = {text.text: text.results for text in texts}
    plot_frontier(results, folder / FRONTIER_FILE)
    plot_divergence(results, folder / DIVERGENCE_FILE)
    plot_layers(importance, plans, folder / LAYERS_FILE)


def _plans(
    importance: Importance,
    policies: Sequence[str] | None,
    budgets: Sequence[float] | None,
    storage_budgets: Sequence[float] | None,
) -> dict[str, Plan]:
    """Named plans; on standard error, those that cannot be had."""
    if not budgets and not storage_budgets:
        budgets = [DEFAULT_BUDGET]
    plans, left_out = make_plans(importance, policies or ["fisher"], budgets or [], storage_budgets or [])
    for reason in left_out:
        typer.echo(reason, err=True)
    return plans


def _show(model: str, texts: Sequence[TextResults], retrievals: Sequence[Retrieval], scores: Sequence[Score]) -> None:
    console = Console()
    for text in texts:
        console.print(results_table(text.results, f"{model}, {text}"))
    if retrievals:
        console.print(passkey_table(retrievals))
    if scores:
        kept, left_out = answerable(scores)
        if kept:
            console.print(scores_table(kept))
        for score in left_out:
            console.print(f"left out: {score.task}, {score.length} tokens: the original answers {score.share:.0%}")
