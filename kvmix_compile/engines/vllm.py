"""vLLM: a plan as options of `vllm serve`, as vLLM 0.32 and 0.33 read them (vllm/config/cache.py)."""

from collections.abc import Sequence

from kvmix_compile.engines.plan import EnginePlan, numbers_of
from kvmix_compile.errors import PlanError
from kvmix_compile.passes.allocate.whole_layers import CacheFormat

# CacheDType, of which these two are formats that are measured here.
KV_CACHE_DTYPES = {"fp8": "fp8", "nvfp4": "nvfp4"}
UNQUANTIZED = "auto"


def vllm_options(plan: EnginePlan) -> list[str]:
    """The options, each word by itself, to go behind `vllm serve MODEL`.

    Layers are numbers with spaces between: one word with commas names no layer to vLLM, which then skips none.

    Raises PlanError for a plan of several formats, or of one that vLLM does not have.
    """
    if not plan.formats:
        return ["--kv-cache-dtype", UNQUANTIZED]
    check_vllm(plan.formats)
    (kept,) = plan.formats
    numbers = numbers_of(plan.skipped)
    both = set(numbers) & set(numbers_of([layer for layer in plan.layers if layer.kept is not None]))
    if both:
        raise PlanError(
            f"layer {min(both)} has several attentions, of which some are skipped, and vLLM skips whole layers: plan "
            "with all of them in one format"
        )
    skipped = ["--kv-cache-dtype-skip-layers", *map(str, numbers)] if numbers else []
    return ["--kv-cache-dtype", KV_CACHE_DTYPES[kept.name], *skipped]


def check_vllm(formats: Sequence[CacheFormat]) -> None:
    """Raise PlanError for several formats, or one that vLLM does not have."""
    if len(formats) > 1:
        raise PlanError(
            "vLLM takes one format for all layers that are not skipped, not "
            f"{' and '.join(each.name for each in formats)}: plan with one of them"
        )
    if (name := formats[0].name) not in KV_CACHE_DTYPES:
        raise PlanError(f"vLLM has no KV cache of {name}: choose {' or '.join(KV_CACHE_DTYPES)}")
