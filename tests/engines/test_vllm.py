"""A plan in vLLM's words. The option's form, words with spaces between, is of vLLM 0.32's own parser."""

import pytest

from kvmix_compile.engines.plan import EngineLayer, EnginePlan
from kvmix_compile.engines.vllm import vllm_options
from kvmix_compile.errors import PlanError
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.passes.allocate.whole_layers import FORMATS

SHAPE = SiteShape(2, 32, 32)


def plan_of(*kept: str | None) -> EnginePlan:
    return EnginePlan(
        tuple(
            EngineLayer((f"model.layers.{number}.self_attn",), SHAPE, FORMATS[name] if name else None)
            for number, name in enumerate(kept)
        )
    )


def test_skipped_layers_are_words_of_their_own() -> None:
    options = vllm_options(plan_of(None, None, "fp8", "fp8", "fp8", None))
    assert options == ["--kv-cache-dtype", "fp8", "--kv-cache-dtype-skip-layers", "0", "1", "5"]
    assert vllm_options(plan_of("nvfp4", "nvfp4")) == ["--kv-cache-dtype", "nvfp4"]
    assert vllm_options(plan_of(None, None)) == ["--kv-cache-dtype", "auto"]


def test_vllm_reads_them_as_they_are_meant() -> None:
    arguments = pytest.importorskip("vllm.engine.arg_utils")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = arguments.EngineArgs.add_cli_args(FlexibleArgumentParser())
    read = parser.parse_args(vllm_options(plan_of(None, "fp8", None)))
    assert (read.kv_cache_dtype, read.kv_cache_dtype_skip_layers) == ("fp8", ["0", "2"])


def test_a_layer_that_reads_what_a_skipped_one_keeps_is_skipped_too() -> None:
    shared = EngineLayer(("model.layers.0.self_attn", "model.layers.7.self_attn"), SHAPE, None)
    options = vllm_options(EnginePlan((shared, *plan_of(None, "fp8").layers[1:])))
    assert options[2:] == ["--kv-cache-dtype-skip-layers", "0", "7"]


def test_what_vllm_cannot_be_told_is_refused() -> None:
    with pytest.raises(PlanError, match="vLLM takes one format .* not fp8 and nvfp4: plan with one"):
        vllm_options(plan_of("fp8", "nvfp4"))
    with pytest.raises(PlanError, match="vLLM has no KV cache of fp8_k_nvfp4_v: choose fp8 or nvfp4"):
        vllm_options(plan_of("fp8_k_nvfp4_v"))
    unnumbered = EngineLayer(("attention",), SHAPE, None)
    with pytest.raises(PlanError, match="attention has none"):
        vllm_options(EnginePlan((unnumbered, *plan_of("fp8").layers)))
    twice = EngineLayer(("model.layers.0.cross_attn",), SHAPE, None)
    with pytest.raises(PlanError, match="layer 0 has several attentions, of which some are skipped"):
        vllm_options(EnginePlan((twice, *plan_of("fp8").layers)))
