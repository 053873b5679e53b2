"""Measured: what each layer of a model would lose in the formats of serving engines, and plans made of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

from torch import nn

from kvmix_compile.compiler import CALIBRATION_LENGTH, find_in, given_calibration, rows_to_measure
from kvmix_compile.config import Config
from kvmix_compile.engines.plan import EngineLayer, EnginePlan
from kvmix_compile.errors import AllocationError, BudgetError
from kvmix_compile.kernels.ambient import as_captured
from kvmix_compile.kernels.format.floats import FP8, NVFP4
from kvmix_compile.model_check import check_model
from kvmix_compile.passes.allocate.policies import limit
from kvmix_compile.passes.allocate.whole_layers import (
    FORMATS,
    CacheFormat,
    Choice,
    LayerLosses,
    total_loss,
    within_budget,
    within_loss,
)
from kvmix_compile.passes.capture.weights import check_weights
from kvmix_compile.passes.measure.format_losses import check_no_latents, measure_formats
from kvmix_compile.passes.measure.importance import usual_context
from kvmix_compile.passes.measure.one_path import capture_to_measure
from kvmix_compile.progress import progress_bar
from kvmix_compile.report import Report

# Nats a token that a plan may be predicted to lose where nothing else is asked for: a perplexity 1% higher.
MOST_LOSS = 0.01

Scales = Literal["one", "calibrated"]


@dataclass(frozen=True)
class MeasuredFormats:
    """layers: of each what it would lose. tokens: that it was measured on.

    scales: "one", which engines take where a checkpoint has none, or "calibrated", those of each of the `layers`.
    context: tokens of the texts that a budget is for.
    """

    layers: tuple[LayerLosses, ...]
    tokens: int
    scales: Scales
    context: int

    def plan(
        self,
        *formats: str,
        budget: float | None = None,
        storage_budget: float | None = None,
        most_loss: float | None = None,
        context: int | None = None,
    ) -> EnginePlan:
        """Which layers are kept in a format, and which at 16 bits.

        formats: names of FORMATS; none: fp8.
        budget, storage_budget: bits of an element, without and with scales: the layers that lose least are kept in the
            formats, as few as make that mean.
        most_loss: instead, of one format: as many layers as are predicted to lose so many nats a token in all, without
            those that lose most. MOST_LOSS where nothing else is said.

        Raises AllocationError or BudgetError where that cannot be done.
        """
        kept, context = check_formats(formats), self.context if context is None else context
        if budget is not None or storage_budget is not None:
            if most_loss is not None:
                raise AllocationError("give either a budget or most_loss: one says how many layers stay at 16 bits")
            return self._planned(within_budget(self.layers, kept, limit(budget, storage_budget), context), context)
        if len(kept) > 1:
            raise AllocationError("several formats are chosen among by a budget: give one, or one format alone")
        most = MOST_LOSS if most_loss is None else most_loss
        if not most >= 0:
            raise BudgetError(f"most_loss is a number of nats a token, 0 or more, not {most}")
        return self._planned(within_loss(self.layers, kept[0], most, context), context)

    def uniform(self, name: str) -> EnginePlan:
        """All layers that it fits in one format."""
        (kept,) = check_formats([name])
        return self._planned(tuple(kept if kept.fits(layer.shape) else None for layer in self.layers), self.context)

    def loss(self, plan: EnginePlan) -> float:
        """Nats a token that a plan of this model is predicted to lose."""
        return total_loss(self.layers, [layer.kept for layer in plan.layers])

    def _planned(self, choice: Choice, context: int) -> EnginePlan:
        pairs = zip(self.layers, choice, strict=True)
        # Without windows the context says nothing.
        told = context if any(layer.window for layer in self.layers) else 0
        return EnginePlan(tuple(EngineLayer(layer.layers, layer.shape, kept) for layer, kept in pairs), told)


def check_formats(names: Sequence[str]) -> tuple[CacheFormat, ...]:
    """The formats of these names, fp8 where there are none. Raises AllocationError for a name that is none."""
    for name in names:
        if name not in FORMATS:
            close = get_close_matches(str(name), FORMATS, n=1)
            meant = f"did you mean {close[0]}?" if close else f"choose from {', '.join(FORMATS)}"
            raise AllocationError(f"there is no KV cache format {name}; {meant}")
    return tuple(FORMATS[name] for name in dict.fromkeys(names)) or (FORMATS["fp8"],)


@as_captured()
def analyze(
    model: nn.Module,
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    scales: Scales = "one",
    progress: bool = False,
) -> MeasuredFormats:
    """What each layer's keys and values would lose in the formats of serving engines.

    tokenizer, calibration: as of kvmix_compile.analyze.
    scales: "one": elements are stored as they are, as vLLM does where a checkpoint has no scales. "calibrated": divided
        by what brings the largest one to the format's.

    Raises KVMixError: UnsupportedModelError for multi-head latent attention, and as kvmix_compile.analyze.
    """
    check_model(model)
    if scales not in get_args(Scales):
        raise AllocationError(f"scales are {' or '.join(get_args(Scales))}, not {scales!r}")
    config = Config(tokenizer=tokenizer, calibration=calibration).checked()
    report = Report(type(model).__name__)
    text = given_calibration(model, report, config)
    check_weights(model)
    found = find_in(capture_to_measure(model, CALIBRATION_LENGTH), report)
    check_no_latents(found.sites)
    rows = rows_to_measure(found, report, config, text)
    with progress_bar("measuring formats", len(rows), progress) as advance:
        layers = measure_formats(
            found.captured, found.sites, rows, (FP8, NVFP4), calibrated=scales == "calibrated", on_row=advance
        )
    return MeasuredFormats(layers, sum(len(row) for row in rows), scales, usual_context(found.captured))


def layers_of(model: nn.Module) -> list[tuple[tuple[str, ...], Any]]:
    """The names of a model's layers, and what they cache; of one without weights, too.

    Raises KVMixError as analyze does.
    """
    check_model(model)
    found = find_in(capture_to_measure(model, CALIBRATION_LENGTH), Report(type(model).__name__))
    check_no_latents(found.sites)
    pairs = zip(found.sites, found.shapes, strict=True)
    return [(tuple(attention.layer for attention in site.attentions), shape) for site, shape in pairs]
