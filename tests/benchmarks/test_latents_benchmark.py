"""The benchmark of latents: both ways are held against the same model at the same bits, and a model is trained."""

import math
from unittest import mock

import pytest
import torch

from tests.helpers.benchmark_modules import benchmark
from tests.helpers.one_capture import captured_once, zoo
from tests.helpers.toy_llama import ids

latents = benchmark("latents")


def test_both_ways_have_the_same_bits_an_element() -> None:
    with mock.patch.object(latents, "capture", captured_once), torch.no_grad():
        narrow, wide = latents.study(zoo("deepseek_v3"), ids(2, 128), ids(1, 200)[0], [4.0])
    assert (narrow["configuration"], wide["configuration"]) == ("latents", "heads")
    for row in (narrow, wide):
        assert row["stored_bits"] == pytest.approx(4, rel=0.05)
        assert 0 < row["divergence"]["mean"] < 1
    # 80 numbers a token, and 320 for all heads.
    assert narrow["smaller"] == pytest.approx(16 / narrow["stored_bits"])
    assert wide["smaller"] == pytest.approx(16 / wide["stored_bits"] / 4)
    assert narrow["token_bytes"] == pytest.approx(80 * narrow["stored_bits"] / 8)


def test_a_model_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "LENGTH", 64)
    model, loss = latents.trained(latents.text()[:4096], steps=20)
    assert not model.training and loss < math.log(256) - 0.5
