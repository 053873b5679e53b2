"""One path of a model that has several is enough to measure on, where all that is measured takes it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kvmix_compile
from kvmix_compile.errors import CaptureError
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.export import capture
from kvmix_compile.passes.measure.one_path import capture_to_measure

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def ids(tokens: int, rows: int = 1) -> Tensor:
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(0))


def test_frequencies_that_change_with_the_text_are_measured_as_they_are_for_short_texts() -> None:
    calibration = ids(60, 4)
    model = tiny("llama", rope_parameters=DYNAMIC, max_position_embeddings=64)
    with pytest.raises(CaptureError, match="data-dependent"):
        capture(model)
    plans = [
        kvmix_compile.analyze(it, calibration=calibration, recent=32).allocate(budget=2.3)
        for it in (model, tiny("llama", max_position_embeddings=64))
    ]
    assert plans[0] == plans[1]


def test_a_model_that_has_seen_a_long_text_is_left_as_it_was() -> None:
    """Its frequencies are those of the long text until it sees a short one."""
    model = tiny("llama", rope_parameters=DYNAMIC, max_position_embeddings=64)
    with torch.no_grad():
        model(ids(80), use_cache=False)
        try:
            kvmix_compile.analyze(model, calibration=ids(60, 4), recent=32)
        except CaptureError as error:
            assert "data-dependent" in str(error)
        found, fresh = (
            model(ids(80), use_cache=False).logits,
            tiny("llama", rope_parameters=DYNAMIC, max_position_embeddings=64),
        )
        assert torch.equal(found, fresh(ids(80), use_cache=False).logits)
        assert torch.equal(model(ids(20), use_cache=False).logits, fresh(ids(20), use_cache=False).logits)
    assert all(type(buffer) is Tensor for buffer in model.buffers())


def test_a_path_that_only_some_texts_take_is_refused() -> None:
    model = tiny("llama")
    embed = model.model.embed_tokens.forward

    def by_first_token(tokens: Tensor) -> Any:
        return embed(tokens) * 2 if bool((tokens[0, 0] == 0).item()) else embed(tokens)

    model.model.embed_tokens.forward = by_first_token
    with pytest.raises(CaptureError, match="data-dependent"):
        capture_to_measure(model, 64)
