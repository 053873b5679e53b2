"""What is found in a few layers of a model without weights is what there is in all of one that has them."""

from typing import Any

import pytest
import torch
from torch import nn

from kvmix_compile.compiler import find
from kvmix_compile.errors import CaptureError
from kvmix_compile.fit import sketch as sketching
from kvmix_compile.fit.layers import Layers, find_layers
from kvmix_compile.fit.sketch import Sketch, sketch
from kvmix_compile.fit.weightless import weightless
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.report import Report
from tests.helpers.one_capture import zoo

ALTERNATING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
DEEP: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3},
    "gpt_oss": ALTERNATING,
    "deepseek_v3": {"num_hidden_layers": 3},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
}


def shapes_and_states(found: Sketch) -> tuple[Any, Any]:
    shapes = [(site.layer, site.shape) for site in found.sites]
    return shapes, [(state.layer, state.row_bytes) for state in found.carried]


@pytest.mark.parametrize("name", DEEP)
def test_a_sketch_is_what_is_found_in_the_whole_model(name: str) -> None:
    model = tiny(name, **DEEP[name])
    found = find(model, Report(name))
    drawn = sketch(weightless(model.config, torch.float32))
    assert shapes_and_states(drawn) == (
        [(site.layer, site.shape) for site in found.sites],
        [(one.path, one.carried.row_bytes) for one in found.captured.stateful],
    )
    assert {site.dtype for site in drawn.sites} == {torch.float32}
    assert drawn.longest_context == found.captured.longest_context


def counting_captures(monkeypatch: pytest.MonkeyPatch, fails_on: int = 0) -> list[int]:
    """How many layers there are each time that a model is captured; of `fails_on` layers it cannot be."""
    captured: list[int] = []
    capture = sketching.capture

    def counting(model: Any) -> Any:
        captured.append(len(model.model.layers))
        if captured[-1] == fails_on:
            raise CaptureError("it wants all of its layers")
        return capture(model)

    monkeypatch.setattr(sketching, "capture", counting)
    return captured


def test_few_layers_are_captured_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = counting_captures(monkeypatch)
    drawn = sketch(weightless(tiny("llama", num_hidden_layers=6).config, torch.float32))
    assert captured == [2]
    assert [site.layer for site in drawn.sites] == [f"model.layers.{index}.self_attn" for index in range(6)]


def test_all_layers_are_captured_of_a_model_that_does_not_run_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = counting_captures(monkeypatch, fails_on=2)
    drawn = sketch(weightless(tiny("llama", num_hidden_layers=3).config, torch.float32))
    assert captured == [2, 3]
    assert len(drawn.sites) == 3


def taken_to_be_alike(model: nn.Module) -> Layers:
    """The layers of a model, said to be all of one kind."""
    found = find_layers(model)
    assert found is not None
    vars(found)["kinds"] = ("the same",) * len(found.modules)
    return found


def test_all_layers_are_captured_where_two_of_a_kind_are_found_to_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = counting_captures(monkeypatch)
    config = tiny("gemma3", **ALTERNATING).config
    monkeypatch.setattr(sketching, "find_layers", taken_to_be_alike)
    drawn = sketch(weightless(config, torch.float32))
    assert captured == [2, 4]
    assert [site.window for site in drawn.sites] == [24, 0, 24, 0]


def test_a_model_that_is_no_list_of_layers_is_captured_whole() -> None:
    (first, *_) = sketch(zoo("hand_written")).sites
    assert first.kv_heads > 0
