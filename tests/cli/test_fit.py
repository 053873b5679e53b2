"""`kvmix fit`: what it prints, writes and refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner, Result

from kvmix_command.main import app
from kvmix_compile.cli.fit import COMPRESSED_PERPLEXITY, ORIGINAL_PERPLEXITY
from tests.helpers.repository import ROOT

# Llama 3.1 8B.
EIGHT_BILLION = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "dtype": "bfloat16",
}  # fmt: skip


def kvmix(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(argument) for argument in arguments])


def record(*arguments: object) -> dict[str, Any]:
    result = kvmix("fit", *arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("8b")
    AutoConfig.for_model("llama", **EIGHT_BILLION).save_pretrained(folder)
    return folder


def test_a_configuration_is_enough(folder: Path) -> None:
    found = record(folder, "--context", 1000, "--batch", 2, "--memory", "20GB")
    assert found["parameters"] == 8_030_261_248
    assert found["weight_bytes_a_device"] == 2 * 8_030_261_248
    own, fp8, *compressed = found["caches"]
    assert own["name"] == "bfloat16"
    assert own["nbytes"] == 2 * 1000 * 131072
    assert own["largest_batch"] == (20 * 10**9 - 2 * 8_030_261_248) // (1000 * 131072)
    assert 2 * fp8["nbytes"] == own["nbytes"]
    assert [cache["name"] for cache in compressed] == ["budget=2.3", "budget=3", "budget=4", "budget=8"]
    sizes = [cache["nbytes"] for cache in compressed]
    assert sizes == sorted(sizes) and sizes[-2] < own["nbytes"]
    contexts = [cache["longest_context"] for cache in compressed]
    assert contexts == sorted(contexts, reverse=True)


def test_dtype_and_devices_are_minded(folder: Path) -> None:
    found = record(folder / "config.json", "--devices", 8, "--dtype", "float32")
    assert found["context"] == 131072
    (own, *_) = found["caches"]
    assert (own["name"], own["nbytes"]) == ("float32", 131072 * 131072 * 2 // 8)
    assert own["largest_batch"] is own["longest_context"] is None


def test_people_read_a_table_and_what_to_know_of_it() -> None:
    result = kvmix("fit", "tiny:gemma2", "--context", 600, "--memory", "0.5MB", "--devices", 2)
    assert result.exit_code == 0
    assert "a cache of 1 x 600 tokens, on each of 2 devices" in result.stdout
    (line,) = (line for line in result.stdout.splitlines() if "│ budget=2.3" in line)
    assert "kB" in line
    assert "The model takes 512 tokens, fewer than these." in result.stdout
    assert "The weights alone do not fit." in result.stdout


def test_states_of_a_hybrid_are_counted_and_told() -> None:
    result = kvmix("fit", "tiny:lfm2", "--context", 100)
    assert "1 layers carry states of fixed size" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["tiny:bert"], "encoder"),
        (["tiny:mamba"], "no KV cache"),
        (["hand_written", "--context", 100, "--devices", 2], "no plan to divide"),
        (["hand_written"], "say with --context"),
        (["no/such/folder"], "there is no such folder"),
    ],
)
def test_what_cannot_be_told_is_refused(arguments: list[object], reason: str) -> None:
    result = kvmix("fit", *arguments)
    assert result.exit_code == 1
    assert reason in result.stderr


@pytest.mark.parametrize(
    ("configuration", "reason"),
    [
        ('{"model_type": "vit"}', "Unrecognized configuration class"),
        ('{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 7}', "not a multiple"),
        ("{", "not a valid JSON file"),
    ],
)
def test_a_configuration_of_no_language_model_is_refused(tmp_path: Path, configuration: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(configuration)
    result = kvmix("fit", tmp_path)
    assert result.exit_code == 1
    assert re.search(f"cannot make a model of the configuration of .*{reason}", result.stderr)
    assert len(result.stderr) < 600


def test_the_perplexities_are_those_that_were_measured() -> None:
    results = json.loads((ROOT / "benchmarks/results/smollm2.json").read_text())["texts"][0]["results"]
    measured = {result["configuration"]: result["perplexity"] for result in results}
    assert round(measured["original"], 3) == ORIGINAL_PERPLEXITY
    assert round(measured["fisher, budget 2.3"], 3) == COMPRESSED_PERPLEXITY
