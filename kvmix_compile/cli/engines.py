"""`kvmix plan --for`: which layers a serving engine may keep in a format of its own, in that engine's words."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from kvmix_compile.cli.loading import load_model, load_on_paper, read_text
from kvmix_compile.cli.output import console_beside, write_json
from kvmix_compile.engines.measured import MeasuredFormats, analyze, check_formats, layers_of
from kvmix_compile.engines.model_optimizer import FILE, metadata, read_metadata
from kvmix_compile.engines.plan import EngineLayer, EnginePlan
from kvmix_compile.engines.vllm import check_vllm, vllm_options
from kvmix_compile.passes.allocate.policies import limit
from kvmix_compile.passes.allocate.whole_layers import CacheFormat, LayerLosses

ENGINES = ("vllm", "modelopt")


@dataclass(frozen=True)
class Asked:
    """What was typed; see engines.measured.MeasuredFormats.plan."""

    engine: str
    formats: tuple[str, ...]
    budget: float | None
    storage_budget: float | None
    most_loss: float | None
    context: int | None
    calibrated: bool

    def check(self) -> None:
        """Raise AllocationError, BudgetError or PlanError for what no model can be given."""
        formats = check_formats(self.formats)
        if self.engine == "vllm":
            check_vllm(formats)
        if self.budget is not None or self.storage_budget is not None:
            limit(self.budget, self.storage_budget)

    def plan(self, measured: MeasuredFormats) -> EnginePlan:
        """The plan that is asked for."""
        return measured.plan(
            *self.formats, budget=self.budget, storage_budget=self.storage_budget, most_loss=self.most_loss,
            context=self.context,
        )  # fmt: skip


def plan_for_engine(
    name: str, asked: Asked, calibration: Path | None, exported: Path | None, output: Path | None
) -> None:
    """Choose layers, or read which ones a checkpoint has chosen, and say so as the engine would be told."""
    asked.check()
    console = console_beside(output)
    if exported is not None:
        found = read_metadata(exported)
        plan = found.plan(layers_of(load_on_paper(name, None)))
        console.print(_formats_table(plan.layers))
        measured = None
    else:
        start = perf_counter()
        loaded = load_model(name)
        text = read_text(calibration) if calibration else None
        measured = analyze(
            loaded.model, tokenizer=loaded.tokenizer, calibration=text, progress=True,
            scales="calibrated" if asked.calibrated else "one",
        )  # fmt: skip
        plan = asked.plan(measured)
        console.print(_losses_table(measured.layers, plan.layers, check_formats(asked.formats)))
        console.print(f"measured on {measured.tokens} tokens in {perf_counter() - start:.1f} s")
    _show(console, plan, measured, asked)
    _write(output, name, plan, measured, asked, console)


def _losses_table(
    measured: Sequence[LayerLosses], layers: Sequence[EngineLayer], formats: Sequence[CacheFormat]
) -> Table:
    """A line for each layer, those first that lose most in the first format that they can be kept in."""
    table = Table(Column("layer", no_wrap=True), title="predicted loss, in nats a million tokens")
    for each in formats:
        for column in (f"{each.name}\nkeys", "values", "together"):
            table.add_column(column, justify="right")
    table.add_column("kept in")
    pairs = sorted(zip(measured, layers, strict=True), key=lambda pair: -max(_of(pair[0], each)[2] for each in formats))
    for losses, layer in pairs:
        cells = [f"{1e6 * loss:.0f}" if loss >= 0 else "-" for each in formats for loss in _of(losses, each)]
        table.add_row(", ".join(layer.names), *cells, _kept(layer))
    return table


def _of(losses: LayerLosses, each: CacheFormat) -> tuple[float, float, float]:
    """What keys, values and both lose; less than nothing where heads cannot be kept so."""
    if not each.fits(losses.shape):
        return -1.0, -1.0, -1.0
    return losses.key_losses[each.key], losses.value_losses[each.value], losses.loss(each)


def _formats_table(layers: Sequence[EngineLayer]) -> Table:
    table = Table(Column("layer", no_wrap=True), "kept in")
    for layer in layers:
        table.add_row(", ".join(layer.names), _kept(layer))
    return table


def _kept(layer: EngineLayer) -> str:
    return "16 bits" if layer.kept is None else layer.kept.name


def _show(console: Console, plan: EnginePlan, measured: MeasuredFormats | None, asked: Asked) -> None:
    """The plan in a sentence, and in the engine's words."""
    lost = "" if measured is None else f", predicted to lose {measured.loss(plan):.4f} nats a token"
    console.print(
        f"{len(plan.skipped)} of {len(plan.layers)} layers stay at 16 bits: {plan.code_bits:.2f} bits an element, "
        f"{plan.stored_bits:.2f} with scales{lost}"
    )
    if asked.engine == "vllm":
        # One line, to be copied.
        console.print(shlex.join(vllm_options(plan)), soft_wrap=True, markup=False, highlight=False)


def _write(
    output: Path | None, name: str, plan: EnginePlan, measured: MeasuredFormats | None, asked: Asked, console: Console
) -> None:
    if asked.engine == "modelopt":
        write_json(output, metadata(plan))
        if output is None:
            console.print(f"--output {FILE} writes this as a checkpoint has it")
        return
    write_json(output, _record(name, plan, measured))


def _record(name: str, plan: EnginePlan, measured: MeasuredFormats | None) -> Mapping[str, Any]:
    layers = [
        {"names": list(layer.names), **vars(layer.shape), "kept": layer.kept.name if layer.kept else None}
        for layer in plan.layers
    ]
    record = {"model": name, "engine": "vllm", "options": vllm_options(plan), "code_bits": plan.code_bits}
    record |= {"stored_bits": plan.stored_bits, "context": plan.context, "layers": layers}
    if measured is None:
        return record
    for layer, losses in zip(layers, measured.layers, strict=True):
        layer |= {
            "key_losses": {each.name: loss for each, loss in losses.key_losses.items()},
            "value_losses": {each.name: loss for each, loss in losses.value_losses.items()},
            "key_scale": losses.key_scale,
            "value_scale": losses.value_scale,
        }
    return record | {"predicted_loss": measured.loss(plan), "tokens": measured.tokens, "scales": measured.scales}
