"""`kvmix plan --for`: what a serving engine is told of a toy model."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from kvmix_compile.cli import loading
from kvmix_compile.engines import measured
from kvmix_compile.models_zoo.tiny import tiny
from tests.cli.test_cli import TEXT, kvmix
from tests.helpers.one_capture import captured_once


@pytest.fixture(scope="module", autouse=True)
def each_model_is_captured_once() -> Iterator[None]:
    with (
        mock.patch.object(loading, "tiny", cache(tiny)),
        mock.patch.object(measured, "capture_to_measure", lambda model, _: captured_once(model)),
    ):
        yield


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_vllm_is_told_which_layers_to_skip(tmp_path: Path, text: Path) -> None:
    path = tmp_path / "plan.json"
    asked = ("plan", "tiny:llama", "--for", "vllm", "--calibration", text, "--budget", 12, "--json", path)
    result = kvmix(*asked)
    assert result.exit_code == 0
    found = json.loads(path.read_text())
    (skipped,) = [layer for layer in found["layers"] if layer["kept"] is None]
    number = skipped["names"][0].split(".")[2]
    assert found["options"] == ["--kv-cache-dtype", "fp8", "--kv-cache-dtype-skip-layers", number]
    assert f"--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers {number}\n" in result.stdout
    assert found["code_bits"] == 12
    losses = [layer["key_losses"]["fp8"] + layer["value_losses"]["fp8"] for layer in found["layers"]]
    assert found["predicted_loss"] == min(losses)
    # The layer that loses most comes first, and is the one that is skipped.
    first = next(line for line in result.stdout.splitlines() if "model.layers." in line)
    assert skipped["names"][0] in first
    assert "16 bits" in first


def test_what_is_written_for_model_optimizer_is_read_back_without_measuring(tmp_path: Path, text: Path) -> None:
    path = tmp_path / "hf_quant_config.json"
    made = kvmix("plan", "tiny:llama", "--for", "modelopt", "--calibration", text, "--budget", 12, "--output", path)
    assert made.exit_code == 0
    written = json.loads(path.read_text())["quantization"]
    assert written["kv_cache_quant_algo"] == "FP8"
    (name,) = written["kv_cache_quantized_layers"]
    skipped = {"0": "1", "1": "0"}[name.split(".")[2]]
    with mock.patch("kvmix_compile.cli.engines.analyze", side_effect=AssertionError):
        read = kvmix("plan", "tiny:llama", "--for", "vllm", "--exported", path)
    assert read.exit_code == 0
    assert f"--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers {skipped}\n" in read.stdout


def test_formats_are_chosen_among_for_model_optimizer(text: Path) -> None:
    asked = ("--format", "fp8", "--format", "nvfp4", "--budget", 6, "--calibrated", "--json", "-")
    result = kvmix("plan", "tiny:llama", "--for", "modelopt", "--calibration", text, *asked)
    assert result.exit_code == 0
    written = json.loads(result.stdout)["quantization"]
    assert written["kv_cache_quant_algo"] == "MIXED_PRECISION"
    assert sorted(layer["quant_algo"] for layer in written["kv_cache_quantized_layers"].values()) == ["FP8", "NVFP4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "fp8", "--format", "nvfp4"], "vLLM takes one format"),
        (["--format", "fp8_k_nvfp4_v"], "vLLM has no KV cache of fp8_k_nvfp4_v: choose fp8 or nvfp4"),
        (["--budget", "17"], "at most, not 17"),
        (["--exported", __file__], "is not JSON, or is damaged"),
    ],
)
def test_what_vllm_cannot_be_given_is_refused_before_anything_is_loaded(arguments: list[str], message: str) -> None:
    nothing = mock.patch.multiple("kvmix_compile.cli.engines", load_model=None, load_on_paper=None)
    with nothing:
        result = kvmix("plan", "tiny:llama", "--for", "vllm", *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_latents_are_refused() -> None:
    result = kvmix("plan", "tiny:deepseek_v3", "--for", "vllm")
    assert result.exit_code == 1
    assert "caches a latent (multi-head latent attention)" in result.stderr
