"""What a server is asked for, and what is refused before anything is loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvmix_compile.errors import KVMixError, PlanError
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.passes.allocate.plan import Plan, SitePlan
from kvmix_vllm.settings import ServingError, Settings, asked_for, check

RELEASE = "0.32.0"


def plan(layers: int = 2, heads: int = 2, size: int = 32) -> Plan:
    shape, stored = SiteShape(heads, size, size), Precision(2, 32, 4)
    sites = tuple(SitePlan(f"model.layers.{number}.self_attn", shape, stored, stored) for number in range(layers))
    return Plan(sites, policy="fisher", fingerprint="none", sinks=4, recent=32)


def config(**changes: Any) -> Any:
    """vLLM's, as far as it is looked at, with things changed: `model__dtype=..` is the dtype of its model."""
    parts: dict[str, dict[str, Any]] = {
        "model": {
            "model": "toy",
            "dtype": torch.float32,
            "is_attention_free": False,
            "is_hybrid": False,
            "is_encoder_decoder": False,
            "use_mla": False,
            "is_mm_prefix_lm": False,
            "rswa_window": None,
            "get_total_num_kv_heads": lambda: 2,
            "get_total_num_hidden_layers": lambda: 2,
            "get_head_size": lambda: 32,
        },
        "cache": {"cache_dtype": "auto", "kv_sharing_fast_prefill": False},
        "parallel": {
            "tensor_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "use_ubatching": False,
        },
        "scheduler": {"disable_hybrid_kv_cache_manager": False},
    }
    whole = {"speculative_config": None, "kv_transfer_config": None, "additional_config": {}}
    for name, value in changes.items():
        part, _, field = name.partition("__")
        (parts[part] if field else whole)[field or part] = value
    return SimpleNamespace(**whole, **{f"{part}_config": SimpleNamespace(**fields) for part, fields in parts.items()})


def test_nothing_is_asked_for_unless_it_is_said() -> None:
    assert asked_for(config()) is None
    assert asked_for(config(additional_config={"other": {}})) is None


@pytest.mark.parametrize("exact", [None, True, False])
def test_a_plan_is_read(tmp_path: Path, exact: bool | None) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    options = {"plan": str(path)} | ({} if exact is None else {"exact_chunks": exact})
    assert asked_for(config(additional_config={"kvmix": options})) == Settings(plan(), exact is not False)


@pytest.mark.parametrize("options", ["plan.json", {}, {"plan": "plan.json", "bits": 2}])
def test_what_is_not_understood_is_refused(options: Any) -> None:
    with pytest.raises(ServingError, match=r"is \{\"plan\": \"plan.json\"\}"):
        asked_for(config(additional_config={"kvmix": options}))


def test_a_plan_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        asked_for(config(additional_config={"kvmix": {"plan": str(tmp_path / "none.json")}}))


def test_exact_chunks_is_true_or_false(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="true or false"):
        asked_for(config(additional_config={"kvmix": {"plan": "plan.json", "exact_chunks": "yes"}}))


def test_what_can_be_served_is_not_refused() -> None:
    check(config(), Settings(plan(), True), RELEASE)
    check(config(parallel__tensor_parallel_size=2), Settings(plan(), True), RELEASE)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cache__cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"model__dtype": torch.float64}, "torch.float64"),
        ({"model__is_hybrid": True}, "otherwise than by attention"),
        ({"model__is_attention_free": True}, "without attention"),
        ({"model__is_encoder_decoder": True}, "encoder-decoder"),
        ({"model__use_mla": True}, "latent attention"),
        ({"model__is_mm_prefix_lm": True}, "images"),
        ({"model__rswa_window": 128}, "begins with the answer"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"parallel__decode_context_parallel_size": 2}, "decode context"),
        ({"parallel__prefill_context_parallel_size": 2}, "prefill context"),
        ({"parallel__use_ubatching": True}, "micro-batches"),
        ({"parallel__tensor_parallel_size": 4}, "2 heads of keys and values on 4 ranks"),
        ({"cache__kv_sharing_fast_prefill": True}, "fast-prefill"),
        ({"scheduler__disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
    ],
)
def test_options_that_cannot_be_served_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ServingError, match=named) as refused:
        check(config(**changes), Settings(plan(), True), RELEASE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("release", ["0.31.2", "0.33.0", "1.0.0"])
def test_other_releases_are_refused(release: str) -> None:
    with pytest.raises(ServingError, match=f"0.32.x, and this is {release}"):
        check(config(), Settings(plan(), True), release)


@pytest.mark.parametrize("other", [{"layers": 3}, {"heads": 4}, {"size": 64}])
def test_a_plan_of_another_model_is_refused(other: dict[str, int]) -> None:
    with pytest.raises(PlanError, match="another model"):
        check(config(), Settings(plan(**other), True), RELEASE)


def test_errors_are_kvmix_errors() -> None:
    assert issubclass(ServingError, KVMixError)
