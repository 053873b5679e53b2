"""Model-Optimizer's metadata. The literals are what its release candidate 0.48.0rc1 writes for such a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvmix_compile.engines.model_optimizer import metadata, read_metadata
from kvmix_compile.engines.plan import EnginePlan
from kvmix_compile.errors import PlanError
from tests.engines.test_vllm import SHAPE, plan_of

MIXED = {
    "quantization": {
        "quant_algo": None,
        "quantized_layers": {},
        "kv_cache_quant_algo": "MIXED_PRECISION",
        "kv_cache_quantized_layers": {
            "model.layers.0.self_attn": {"quant_algo": "FP8"},
            "model.layers.2.self_attn": {"quant_algo": "NVFP4"},
            "model.layers.3.self_attn": {"quant_algo": "FP8_K_NVFP4_V"},
        },
        "kv_cache_schema_version": 1,
    }
}
LAYERS = [((f"model.layers.{number}.self_attn",), SHAPE) for number in range(4)]


def read(tmp_path: Path, document: Any, name: str = "hf_quant_config.json") -> EnginePlan:
    path = tmp_path / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return read_metadata(path).plan(LAYERS)


def test_a_plan_is_written_as_model_optimizer_writes_it() -> None:
    written = metadata(plan_of("fp8", None, "nvfp4", "fp8_k_nvfp4_v"))
    assert written.pop("producer")["name"] == "kvmix_compile"
    assert written == MIXED
    alike = metadata(plan_of("fp8", None, "fp8", None))["quantization"]
    assert alike["kv_cache_quant_algo"] == "FP8"
    assert list(alike["kv_cache_quantized_layers"]) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    with pytest.raises(PlanError, match="every layer stays at 16 bits"):
        metadata(plan_of(None, None))


@pytest.mark.parametrize("kept", [("fp8", None, "nvfp4", "fp8_k_nvfp4_v"), ("fp8", None, "fp8", "fp8")])
def test_what_was_written_is_read_back(tmp_path: Path, kept: tuple[str | None, ...]) -> None:
    plan = plan_of(*kept)
    assert read(tmp_path, metadata(plan)) == plan
    assert read_metadata(tmp_path).plan(LAYERS) == plan  # by its folder


def test_a_config_has_it_too(tmp_path: Path) -> None:
    section = {"quant_method": "modelopt", **MIXED["quantization"]}
    assert read(tmp_path, {"quantization_config": section}, "config.json") == plan_of(
        "fp8", None, "nvfp4", "fp8_k_nvfp4_v"
    )
    assert read_metadata(tmp_path).plan(LAYERS).layers[0].kept is not None


@pytest.mark.parametrize(
    "section",
    [
        {"kv_cache_quant_algo": "FP8"},
        {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
    ],
)
def test_one_format_for_all_layers_is_read_as_0_47_writes_it(tmp_path: Path, section: dict[str, Any]) -> None:
    assert read(tmp_path, {"quantization": section}) == plan_of("fp8", "fp8", "fp8", "fp8")


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("{", "is not JSON, or is damaged"),
        ({"architectures": []}, "says nothing of quantization"),
        ({"quantization": {"kv_cache_quant_algo": None}}, "has no format for the KV cache"),
        ({"quantization": {"kv_cache_quant_algo": "INT8"}}, "has the format INT8 for the KV cache"),
        ({"quantization": {"kv_cache_quantized_layers": ["0"]}}, "is damaged"),
        (
            {"quantization": {"kv_cache_quantized_layers": {}, "kv_cache_schema_version": 2}},
            "has version 2 of Model-Optimizer's schema",
        ),
        (
            {"quantization": {"kv_cache_quantized_layers": {"model.layers.4.self_attn": {"quant_algo": "FP8"}}}},
            r"is of another model: it has model\.layers\.4\.self_attn",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, document: Any, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        read(tmp_path, document)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read"):
        read_metadata(tmp_path / "none.json")
