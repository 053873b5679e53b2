"""`kvmix eval`: what each way of keeping the KV cache costs in bits, and what it does to the model's predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from torch import Tensor

from kvmix_command.launched import is_first
from kvmix_compile.cli.efforts import EVERYTHING, QUICK, USUAL, Effort
from kvmix_compile.cli.loading import LoadedModel, load_model, read_text
from kvmix_compile.cli.measuring import analyze_on, calibration_rows
from kvmix_compile.cli.output import console_beside, write_json
from kvmix_compile.cli.tables import (
    arrivals_table,
    drafts_table,
    passkey_table,
    results_table,
    scores_table,
    writing_table,
)
from kvmix_compile.config import DEFAULT_BUDGET
from kvmix_compile.evaluate.answering import check_positions
from kvmix_compile.evaluate.arrival import arrivals, arriving_text
from kvmix_compile.evaluate.baselines import check_baselines, packages, published_plans, quantized_caches
from kvmix_compile.evaluate.comparison import check_length, compare
from kvmix_compile.evaluate.configurations import EXACT_CHUNKS, Compiled, Configuration, compile_plans, make_plans
from kvmix_compile.evaluate.drafting import TOKENS as DRAFTED_TOKENS
from kvmix_compile.evaluate.drafting import draft, repeating_prompt
from kvmix_compile.evaluate.held_out import held_out_english, token_ids
from kvmix_compile.evaluate.opponents import Rotations, simulated_caches
from kvmix_compile.evaluate.passkey import LENGTHS, Passkey, check_passkeys, hide_passkeys, retrieve
from kvmix_compile.evaluate.perplexity import WINDOW, windowed
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
from kvmix_compile.evaluate.records import Findings, TextResults, record
from kvmix_compile.evaluate.spectral import fitted_rotations
from kvmix_compile.evaluate.tasks import Question, answerable, check_room, make_questions, solve
from kvmix_compile.evaluate.writing import LONGEST_PROMPT, write
from kvmix_compile.evaluate.written import CHUNK as DECODED_CHUNK
from kvmix_compile.evaluate.written import written_text
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.allocate.policies import check_policy, limit
from kvmix_compile.passes.measure.importance import Importance


def evaluate(
    name: str,
    quick: bool,
    everything: bool,
    texts: Sequence[Path] | None,
    tokens: int | None,
    budgets: Sequence[float] | None,
    storage_budgets: Sequence[float] | None,
    plan_files: Sequence[Path] | None,
    policies: Sequence[str] | None,
    exact_chunks: bool | None,
    baselines: Sequence[str] | None,
    decode: int | None,
    writing: int | None,
    ways: int | None,
    drafts: bool | None,
    passkey: bool,
    passkey_lengths: Sequence[int] | None,
    passkey_depths: Sequence[float] | None,
    tasks: Sequence[str] | None,
    task_lengths: Sequence[int] | None,
    task_questions: int | None,
    calibration: Path | None,
    json_file: Path | None,
    plots: Path | None,
) -> None:
    """Measure, show, and write what is asked for. Raises InputError, before that, for what cannot be had."""
    if (passkey or passkey_depths) and not passkey_lengths:
        passkey_lengths = list(LENGTHS)
    effort = (QUICK if quick else EVERYTHING if everything else USUAL).with_options(
        tokens=tokens, baselines=baselines, decode=decode, passkey_lengths=passkey_lengths,
        passkey_depths=passkey_depths, tasks=list(PUZZLES) if "all" in (tasks or ()) else tasks,
        task_lengths=task_lengths, task_questions=task_questions, ways=ways, writing=writing, drafts=drafts,
        exact_chunks=exact_chunks,
    )  # fmt: skip
    for policy in policies or ():
        check_policy(policy)
    for bits in (*(budgets or ()), *(storage_budgets or ())):
        limit(bits, None)
    saved = {path.name: Plan.load(path) for path in plan_files or ()}
    loaded = load_model(name)
    model = loaded.model
    if plots is not None:
        check_plots(plots)
    check_baselines(effort.baselines, model)
    material = _material(loaded, effort, texts or [])
    importance = analyze_on(loaded, calibration)
    plans = _plans(importance, policies, budgets, storage_budgets, saved, effort.exact_chunks)
    plans |= published_plans(effort.baselines, importance)
    rotations = partial(_rotations, loaded, calibration)
    others = [
        *simulated_caches(effort.baselines, model, importance, rotations),
        *quantized_caches(effort.baselines, model),
    ]
    found = _measured(
        [Configuration("original", model), *compile_plans(model, plans), *others], loaded, effort, material
    )

    _show(console_beside(json_file), name, found)
    write_json(json_file, record(name, found, importance, plans, packages(effort.baselines)))
    if plots is not None and is_first():
        _plot(plots, found.texts, importance, plans)


@dataclass(frozen=True)
class _Material:
    """What the configurations are to read, made before anything is measured."""

    texts: Mapping[str, Tensor]
    passkeys: Sequence[Passkey]
    questions: Sequence[Question]
    decoded: Tensor | None
    arriving: Tensor | None


def _material(loaded: LoadedModel, effort: Effort, texts: Sequence[Path]) -> _Material:
    """Raises InputError for what cannot be had, or is more than the model has positions for."""
    tokenizer, original = loaded.require_tokenizer(), Configuration("original", loaded.model)
    read = _texts(tokenizer, texts, effort.tokens)
    passkeys = hide_passkeys(tokenizer, effort.passkey_lengths, effort.passkey_depths)
    questions = make_questions(tokenizer, effort.tasks, effort.task_lengths, effort.task_questions)
    check_passkeys([original], tokenizer, passkeys)
    check_room([original], questions)
    check_positions([original], effort.decode, "the tokens to decode", "--decode")
    check_positions(
        [original], effort.writing and effort.writing + LONGEST_PROMPT, "a prompt and the tokens to write", "--writing"
    )
    if effort.drafts:
        check_positions([original], DRAFTED_TOKENS, "a prompt and what is drafted", "evaluation, without --drafts")
    arriving = arriving_text(tokenizer, effort.ways) if effort.ways else None
    check_positions([original], 0 if arriving is None else len(arriving), "the text that comes in", "--ways")
    decoded = written_text(loaded.model, tokenizer, effort.decode, progress=True) if effort.decode else None
    return _Material(read, passkeys, questions, decoded, arriving)


def _measured(
    configurations: Sequence[Configuration], loaded: LoadedModel, effort: Effort, material: _Material
) -> Findings:
    tokenizer, options = loaded.require_tokenizer(), {"progress": True}
    for ids in material.texts.values():
        check_length(configurations, min(WINDOW, len(ids)))
    for tokens in (effort.decode, effort.writing):
        if tokens:
            check_length(configurations, tokens)
    texts = [
        TextResults(text, len(ids), compare(configurations, ids, **options)) for text, ids in material.texts.items()
    ]
    if material.decoded is not None:
        results = compare(configurations, material.decoded, DECODED_CHUNK, effort.decode, **options)
        text = "written by the original"
        texts.append(TextResults(text, len(material.decoded), results, effort.decode, DECODED_CHUNK))
    own = [each for each in configurations if isinstance(each, Compiled)]
    passkeys, questions, arriving = material.passkeys, material.questions, material.arriving
    return Findings(
        texts=texts,
        retrievals=retrieve(configurations, tokenizer, passkeys, **options) if passkeys else [],
        scores=solve(configurations, tokenizer, questions, **options) if questions else [],
        arrivals=[] if arriving is None else arrivals(configurations[0], own, arriving, **options),
        drafts=draft(configurations, repeating_prompt(tokenizer), **options) if effort.drafts else [],
        writings=write(configurations, tokenizer, effort.writing, **options) if effort.writing else [],
    )


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
    saved: Mapping[str, Plan],
    exact_chunks: bool,
) -> dict[str, Plan]:
    """Named plans; on standard error, those that cannot be had."""
    if not budgets and not storage_budgets and not saved:
        budgets = [DEFAULT_BUDGET]
    plans, left_out = make_plans(importance, policies or ["fisher"], budgets or [], storage_budgets or [])
    for reason in left_out:
        typer.echo(reason, err=True)
    plans |= saved
    exact = {f"{name}, {EXACT_CHUNKS}": replace(plan, exact_chunks=True) for name, plan in plans.items()}
    return plans | exact if exact_chunks else plans


def _show(console: Console, model: str, found: Findings) -> None:
    for text in found.texts:
        console.print(results_table(text.results, f"{model}, {text}"))
    if found.retrievals:
        console.print(passkey_table(found.retrievals))
    if found.scores:
        kept, left_out = answerable(found.scores)
        if kept:
            console.print(scores_table(kept))
        for score in left_out:
            console.print(f"left out: {score.task}, {score.length} tokens: the original answers {score.share:.0%}")
    if found.arrivals:
        console.print(arrivals_table(found.arrivals))
    if found.drafts:
        console.print(drafts_table(found.drafts))
    if found.writings:
        console.print(writing_table(found.writings))
