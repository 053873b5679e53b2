"""Format losses: what each layer's keys and values would lose in the float formats of serving engines.

Measured as passes.measure.importance measures this project's own precisions, but in the state that engines keep: every
token is rounded as it is written, the first and the recent ones too, all read themselves from there, and nothing is
rotated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from kvmix_compile.kernels.format.floats import FloatFormat, fitting_scale
from kvmix_compile.passes.allocate.whole_layers import LayerLosses
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.match.mixing import running
from kvmix_compile.passes.match.sites import AttentionSite
from kvmix_compile.passes.measure.exponents import check_finite
from kvmix_compile.passes.measure.importance import usable_rows
from kvmix_compile.passes.measure.products import products_in_float32
from kvmix_compile.passes.measure.read_again import KeyReaders
from kvmix_compile.passes.measure.recorder import Recorder
from kvmix_compile.passes.measure.sensitivity import SATURATED
from kvmix_compile.passes.measure.stored_reads import StoredReads, stored_reads

# Of a row, for engines keep no tokens as they are.
SINKS = RECENT = 0


def measure_formats(
    captured: Captured,
    sites: Sequence[AttentionSite],
    rows: Sequence[Tensor],
    formats: Sequence[FloatFormat],
    *,
    calibrated: bool = False,
    on_row: Callable[[], None] = lambda: None,
) -> tuple[LayerLosses, ...]:
    """What keys and values of each site would lose in each of the formats that fits them, on `rows` of token ids (int64
    `[tokens]`), one forward and one backward each.

    calibrated: elements are divided by a scale that brings the largest one of these rows to the format's, which takes
        another forward of each row; else by 1, as engines do where a checkpoint has no scales.
    on_row: called after each row.

    Raises UnsupportedModelError for latents, CalibrationError where all rows are too short.
    """
    check_no_latents(sites)
    rows = usable_rows(rows)
    recorder, products = Recorder(captured, sites), products_in_float32(captured.model)
    keys = [_Tally(tuple(each for each in formats if each.fits(site.key_dim))) for site in sites]
    values = [_Tally(tuple(each for each in formats if each.fits(site.value_dim))) for site in sites]
    if calibrated:
        for row in rows:
            with running(captured), products:
                _see_largest(recorder, row, keys, values)
        for tally in chain(keys, values):
            tally.scale = fitting_scale(max(captured.head_ranks.told(tally.largest)))
    for row in rows:
        with running(captured), products:
            _add_row(recorder, row, keys, values)
        on_row()
    return tuple(
        LayerLosses(
            layers=tuple(attention.layer for attention in site.attentions),
            shape=captured.whole(site.shape),
            key_losses=key.losses(captured, len(rows), "keys", site.layer),
            value_losses=value.losses(captured, len(rows), "values", site.layer),
            key_scale=key.scale,
            value_scale=value.scale,
        )
        for site, key, value in zip(sites, keys, values, strict=True)
    )


def check_no_latents(sites: Sequence[AttentionSite]) -> None:
    """Raise UnsupportedModelError for multi-head latent attention, which engines keep in formats of its own."""
    if latents := [site.layer for site in sites if site.values_are_keys]:
        raise UnsupportedModelError(
            f"{latents[0]} caches a latent (multi-head latent attention), which engines keep in formats of their own "
            "that are not measured here: choose one of them for the whole model, or compress it with "
            "kvmix_compile.apply"
        )


@dataclass
class _Tally:
    """Sums over calibration rows for the keys or the values of one site, by format.

    lost: the predicted loss. read_again: the same where keys are read with their errors, softmax and all.
    largest: the magnitude of the largest element that was seen.
    """

    formats: tuple[FloatFormat, ...]
    scale: float = 1.0
    largest: float = 0.0
    lost: dict[FloatFormat, float] = field(default_factory=dict)
    read_again: dict[FloatFormat, float] = field(default_factory=dict)

    def add(self, elements: Tensor, reads: StoredReads, readers: KeyReaders | None = None) -> None:
        """Add one row: keys or values `[kv_heads, tokens, dim]`, and how they are read; readers: of what is scored."""
        everything = slice(None)
        for each in self.formats:
            error = each.as_stored(elements.float(), self.scale) - elements.float()
            changes = reads.changes(error, everything).double()
            lost = 0.5 * changes.square().sum().item() / elements.shape[1]
            self.lost[each] = self.lost.get(each, 0.0) + lost
            if readers is not None:
                self.read_again[each] = self.read_again.get(each, 0.0) + readers.loss(error, everything)

    def losses(self, captured: Captured, rows: int, what: str, layer: str) -> dict[FloatFormat, float]:
        """Of each format the mean over so many rows, of all ranks' heads. Where softmax is saturated, that of reading
        again. Raises UnsupportedModelError, naming the layer, where it is not finite.
        """
        of_ranks = captured.head_ranks.told((self.lost, self.read_again))
        first_order, again = (
            {each: sum(part.get(each, 0.0) for part in parts) / rows for each in self.formats}
            for parts in zip(*of_ranks, strict=True)
        )
        losses = {each: _saturated_or_not(first_order[each], again[each]) for each in self.formats}
        check_finite(
            torch.tensor(list(losses.values())), f"gradients of the loss with respect to its {what}, or these,", layer
        )
        return losses


def _saturated_or_not(first_order: float, again: float) -> float:
    return again if again > SATURATED * first_order else first_order


def _see_largest(recorder: Recorder, row: Tensor, keys: Sequence[_Tally], values: Sequence[_Tally]) -> None:
    with torch.no_grad():
        recorder.run(*recorder.captured.inputs(row))
    for site, key, value in zip(recorder.sites, keys, values, strict=True):
        for node, tally in ((site.key, key), (site.value, value)):
            tally.largest = max(tally.largest, recorder.values[node].abs().max().item())
    recorder.forget()


def _add_row(recorder: Recorder, row: Tensor, keys: Sequence[_Tally], values: Sequence[_Tally]) -> None:
    _, gradients = recorder.gradients_on(row)
    for site, key, value in zip(recorder.sites, keys, values, strict=True):
        # What is stored once is lost by each attention that reads it, in another layer's outcome.
        for attention in site.attentions:
            read = recorder.attention_on(attention, gradients[attention.output][0], SINKS, RECENT)
            scored, weighed = stored_reads(read)
            key.add(read.key, scored, KeyReaders.of(read))
            value.add(read.value, weighed)
    recorder.forget()
