"""The report at the start: what is held in which pages, and how many tokens fit."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, iter_layer_specs

from kvmix_vllm.backend import RAW
from kvmix_vllm.settings import ServingError, Settings
from kvmix_vllm.specs import PackedSpec, RawSpec

# Of what the tokens that fit are compared with.
STOCK_BITS = 16

logger = init_logger("vllm.kvmix")


def check_groups(config: VllmConfig, allotted: KVCacheConfig) -> None:
    """Raises ServingError where a layer is not served with the plan after all, or where the longest request would wait
    for pages for ever.
    """
    most = 0
    length = config.model_config.max_model_len
    for group in allotted.kv_cache_groups:
        for spec in iter_layer_specs(group.kv_cache_spec):
            if not isinstance(spec, PackedSpec | RawSpec):
                raise ServingError(
                    f"kvmix cannot serve {group.layer_names[0]}, whose cache is a {type(spec).__name__}: serve the "
                    "model without a plan"
                )
        most += _most_pages(next(iter(iter_layer_specs(group.kv_cache_spec))), length)
    # vLLM keeps a block that holds nothing.
    if most >= allotted.num_blocks:
        raise ServingError(
            f"a request of {length} tokens takes up to {most} blocks while its prompt is read, and "
            f"{allotted.num_blocks - 1} fit into the memory for the cache: allow more, or a smaller --max-model-len"
        )


def _most_pages(spec: KVCacheSpec, length: int) -> int:
    return spec.kept.most_pages_of_chunk(length) if isinstance(spec, RawSpec) else -(-length // spec.block_size)


def report(config: VllmConfig, settings: Settings, allotted: KVCacheConfig) -> None:
    """Logs what is held in which pages, and the tokens that fit, beside those of 16 bits."""
    plan = settings.plan
    for group in allotted.kv_cache_groups:
        logger.info("kvmix: %s", _described(list(iter_layer_specs(group.kv_cache_spec)), len(group.layer_names)))
    size = allotted.kv_cache_tensors[0].size
    tokens, _ = get_kv_cache_capacity(config, allotted)
    stock = size // _stock_token_bytes(allotted)
    logger.info(
        "kvmix: %.2f stored bits; %d tokens of requests of %d fit into %.2f GB, where %d would at %d bits: "
        "%.2f times as many; chunks are %s",
        plan.storage_bits,
        tokens,
        config.model_config.max_model_len,
        size / 1e9,
        stock,
        STOCK_BITS,
        tokens / max(1, stock),
        "exact" if settings.exact_chunks else "not exact: outputs depend on how prompts are cut, and on what is cached",
    )


def _described(specs: list[KVCacheSpec], layers: int) -> str:
    first = specs[0]
    if isinstance(first, RawSpec):
        kept = first.kept
        what = (
            f"the last {kept.window} tokens" if kept.window else f"{kept.sinks} first and {kept.recent} recent tokens"
        )
        return f"unquantized pages of {first.block_size} tokens hold {what} of {layers} layers"
    sizes = sum(spec.page_size_bytes for spec in specs)
    return f"packed pages of {first.block_size} tokens, {sizes} bytes, hold the others of {layers} layers"


def _stock_token_bytes(allotted: KVCacheConfig) -> int:
    """Bytes of a token's keys and values at 16 bits, in all layers."""
    elements = {}
    for group in allotted.kv_cache_groups:
        specs = list(iter_layer_specs(group.kv_cache_spec))
        # A group of one kind has one spec for all of its layers.
        specs = specs if len(specs) == len(group.layer_names) else specs * len(group.layer_names)
        for name, spec in zip(group.layer_names, specs, strict=True):
            elements[name.removesuffix(RAW)] = spec.num_kv_heads * (spec.head_size + spec.head_size_v)
    return sum(elements.values()) * STOCK_BITS // 8
