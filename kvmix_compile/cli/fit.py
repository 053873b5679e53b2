"""`kvmix fit`: how large a model's cache is, and how many tokens fit into a memory, on paper."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from kvmix_compile.cli.loading import LoadError, load_on_paper
from kvmix_compile.cli.output import console_beside, write_json
from kvmix_compile.config import DEFAULT_BUDGET
from kvmix_compile.fit.answers import Answer, Question, answers_to, dtype_name
from kvmix_compile.fit.devices import Share, share
from kvmix_compile.fit.sketch import Sketch, sketch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Perplexities of SmolLM2-135M-Instruct on wikitext-2: benchmarks/results/smollm2.json.
ORIGINAL_PERPLEXITY, COMPRESSED_PERPLEXITY = 20.256, 20.291


def fit(
    name: str,
    context: int | None,
    batch: int,
    devices: int,
    memory: int | None,
    dtype: str | None,
    json_file: Path | None,
) -> None:
    """Show what MODEL's cache takes of a device, and what fits. Raises KVMixError where that cannot be told."""
    model = load_on_paper(name, DTYPES[dtype] if dtype else None)
    drawn = sketch(model)
    question = Question(_tokens(context, drawn), batch, devices, memory)
    of_device = share(model, drawn, devices)
    answers = answers_to(question, of_device)
    notes = list(_notes(model, drawn, of_device, question))
    console = console_beside(json_file)
    console.print(_table(answers, question, type(model).__name__))
    console.print(f"weights: {_size(of_device.weight_bytes)} a device; {_parameters(model):,} parameters in all")
    for note in notes:
        console.print(note, markup=False, highlight=False)
    write_json(json_file, _record(model, question, of_device, answers, notes))


def _tokens(context: int | None, drawn: Sketch) -> int:
    """Raises LoadError where no number of tokens is told, by the model neither."""
    tokens = context or drawn.longest_context
    if tokens is None:
        raise LoadError(
            "the configuration does not say how many tokens this model takes: say with --context how many the cache is "
            "to hold"
        )
    return tokens


def _table(answers: Sequence[Answer], question: Question, model: str) -> Table:
    """A line for each kind of cache."""
    where = f", on each of {question.devices} devices" if question.devices > 1 else ""
    table = Table(title=f"{model}: a cache of {question.batch} x {question.context} tokens{where}")
    table.add_column("cache", no_wrap=True)
    for column in ("stored\nbits", "size", "times\nsmaller"):
        table.add_column(column, justify="right")
    if question.memory is not None:
        table.add_column(f"rows in\n{_size(question.memory)}", justify="right")
        table.add_column(f"tokens in each\nof {question.batch} rows", justify="right")
    for answer in answers:
        cells = [f"{answer.stored_bits:.2f}", _size(answer.nbytes), f"{answers[0].nbytes / answer.nbytes:.2f}"]
        if question.memory is not None:
            context = "any" if answer.longest_context is None else str(answer.longest_context)
            cells += [str(answer.largest_batch), context]
        table.add_row(answer.name, *cells)
    return table


def _notes(model: nn.Module, drawn: Sketch, of_device: Share, question: Question) -> Iterator[str]:
    if getattr(getattr(model, "config", None), "quantization_config", None):
        counted = dtype_name(next(model.parameters()).dtype)
        yield f"Its checkpoint keeps weights quantized; here they count as {counted}."
    if drawn.carried:
        row_bytes = sum(state.row_bytes for state in drawn.carried)
        yield (
            f"{len(drawn.carried)} layers carry states of fixed size: {_size(row_bytes)} a row, counted in every "
            "cache, unquantized and on each device."
        )
    if of_device.whole_layers:
        yield (
            f"{of_device.whole_layers} of {len(drawn.sites)} attention layers keep all of their KV heads on each "
            "device: transformers' plan does not divide them, or they have one."
        )
    if question.memory is not None and of_device.weight_bytes > question.memory:
        yield "The weights alone do not fit."
    if drawn.longest_context is not None and question.context > drawn.longest_context:
        yield f"The model takes {drawn.longest_context} tokens, fewer than these."
    yield "Not counted: activations, what libraries take, and copies while a cache grows."
    yield (
        "What is lost no configuration tells: measure it with `kvmix eval`. The perplexity of SmolLM2-135M-Instruct on "
        f"wikitext-2 is {ORIGINAL_PERPLEXITY}, and {COMPRESSED_PERPLEXITY} with budget={DEFAULT_BUDGET:g}."
    )


def _record(
    model: nn.Module, question: Question, of_device: Share, answers: Sequence[Answer], notes: Sequence[str]
) -> dict[str, Any]:
    return {
        "model": type(model).__name__,
        **vars(question),
        "parameters": _parameters(model),
        "weight_bytes_a_device": of_device.weight_bytes,
        "model_takes_tokens": of_device.cached.longest_context,
        "sites": [{"layer": site.layer, **vars(site.shape)} for site in of_device.cached.sites],
        "caches": [vars(answer) for answer in answers],
        "notes": list(notes),
    }


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _size(count: int) -> str:
    """A number of bytes in the decimal unit that it has one to three digits of."""
    for unit, step in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count / 1000:.2f} kB"
