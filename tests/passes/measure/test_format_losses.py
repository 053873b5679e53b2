"""What layers lose in the float formats of engines: measured in the state that engines keep."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kvmix_compile.compiler import find_in
from kvmix_compile.errors import CalibrationError, UnsupportedModelError
from kvmix_compile.kernels.format.floats import FP8, NVFP4, FloatFormat
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.allocate.whole_layers import LayerLosses
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.measure.format_losses import measure_formats
from kvmix_compile.report import Report
from tests.helpers.one_capture import captured_once, zoo
from tests.helpers.toy_llama import ids

SHIFT = 1e-3


class Exact(FloatFormat):
    """It loses nothing."""

    def as_stored(self, elements: Tensor, scale: float = 1.0) -> Tensor:
        return elements


def losses(name: str, *formats: FloatFormat, rows: Tensor | None = None) -> tuple[LayerLosses, ...]:
    captured = captured_once(zoo(name))
    text = list(ids(2, 64) if rows is None else rows)
    return measure_formats(captured, find_sites(captured).matched, text, formats or (FP8, NVFP4))


def test_what_is_exact_loses_nothing_and_fewer_bits_lose_more() -> None:
    exact = Exact("exact", bits=32)
    for layer in losses("llama", exact, FP8, NVFP4):
        for side in (layer.key_losses, layer.value_losses):
            assert side[exact] == 0
            assert 0 < side[FP8] < side[NVFP4]


def test_the_first_tokens_and_the_last_count_too() -> None:
    """Which this project's own cache never rounds."""

    class OfOneToken(FloatFormat):
        def as_stored(self, elements: Tensor, scale: float = 1.0) -> Tensor:
            stored = elements.clone()
            stored[:, self.bits] += 0.1
            return stored

    first, last = OfOneToken("first", bits=0), OfOneToken("last", bits=62)
    for layer in losses("llama", first, last, rows=ids(1, 64)):
        assert layer.value_losses[first] > layer.value_losses[last] > 0
        assert layer.key_losses[first] > 0


def test_the_prediction_is_what_an_error_of_values_does() -> None:
    """Of the last layer's, which is small and alike in all tokens: half the mean squared change of a token's loss. The
    prediction squares what each head does by itself, which their sum is within a factor of.
    """
    captured, text = captured_once(zoo("llama")), ids(1, 64)
    (*_, site) = find_sites(captured).matched

    class Shifted(FloatFormat):
        def as_stored(self, elements: Tensor, scale: float = 1.0) -> Tensor:
            stored = elements.clone()
            stored[..., 0] += SHIFT
            return stored

    class Moved(fx.Interpreter):
        def __init__(self, shift: float) -> None:
            super().__init__(captured.module)
            self.shift = shift

        def run_node(self, node: fx.Node) -> object:
            value = super().run_node(node)
            if node is site.value:
                value = value.clone()
                value[..., 0] += self.shift
            return value

        def losses(self) -> Tensor:
            with torch.no_grad():
                logits = self.run(*captured.inputs(text[0]))
            return F.cross_entropy(logits[0, :-1].double(), text[0, 1:], reduction="none")

    change = (Moved(SHIFT).losses() - Moved(-SHIFT).losses()) / 2
    found = 0.5 * change.square().sum().item() / text.numel()
    shifted = Shifted("shifted", bits=16)
    (*_, measured) = losses("llama", shifted, rows=text)
    assert found / 4 < measured.value_losses[shifted] < found * 4


def test_elements_that_a_scale_of_one_cannot_hold_are_saved_by_a_calibrated_one() -> None:
    """Values of hundreds, which E4M3 cuts off at 448, read back by an output projection that is as much smaller."""
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight *= 2**14
        attention.o_proj.weight /= 2**14
    captured = captured_once(model)
    text, sites = list(ids(2, 64)), find_sites(captured).matched
    plain, scaled = (measure_formats(captured, sites, text, [FP8], calibrated=each) for each in (False, True))
    usual = losses("llama", FP8)
    assert plain[0].value_losses[FP8] > 100 * usual[0].value_losses[FP8]
    assert scaled[0].value_losses[FP8] == pytest.approx(usual[0].value_losses[FP8], rel=0.3)
    assert scaled[0].value_scale > 1
    assert plain[0].value_scale == 1


def test_formats_that_do_not_fit_heads_are_not_measured() -> None:
    sixths = replace(NVFP4, block=24)
    assert all(set(layer.key_losses) == {FP8} for layer in losses("llama", FP8, sixths))


def test_layers_with_a_window_are_measured_too() -> None:
    windowed = losses("gemma2")
    assert [layer.window for layer in windowed] == [24, 0]
    assert all(layer.key_losses[NVFP4] > 0 for layer in windowed)


def test_texts_that_are_too_short_are_refused() -> None:
    with pytest.raises(CalibrationError, match="at least 32 tokens"):
        losses("llama", rows=ids(1, 8))


def test_latents_are_refused() -> None:
    found = find_in(captured_once(zoo("deepseek_v3")), Report("deepseek_v3"))
    with pytest.raises(UnsupportedModelError, match=r"caches a latent .* choose one of them for the whole model"):
        measure_formats(found.captured, found.sites, list(ids(1, 64)), [FP8])
