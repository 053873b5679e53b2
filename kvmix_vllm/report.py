"""The report at the start: what is held in which pages, and how many tokens fit."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec, iter_layer_specs

from kvmix_vllm.backend import RAW
from kvmix_vllm.settings import ServingError, Settings
from kvmix_vllm.specs import KeptSpec, PackedSpec, PackedWindowSpec, RawSpec

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
            if not isinstance(spec, PackedSpec | KeptSpec):
                raise ServingError(
                    f"kvmix cannot serve {group.layer_names[0]}, whose cache is a {type(spec).__name__}: serve the "
                    "model without a plan"
                )
        most += _most_pages(next(iter(iter_layer_specs(group.kv_cache_spec))), length, config.max_in_flight_tokens)
    # vLLM keeps a block that holds nothing.
    if most >= allotted.num_blocks:
        raise ServingError(
            f"a request of {length} tokens takes up to {most} blocks while its prompt is read, and "
            f"{allotted.num_blocks - 1} fit into the memory for the cache: allow more, or a smaller --max-model-len"
        )


def _most_pages(spec: KVCacheSpec, length: int, chunk: int) -> int:
    """Pages that a request takes at most which is read in chunks of so many tokens."""
    if isinstance(spec, RawSpec):
        return spec.kept.most_pages_of_chunk(length)
    whole = -(-length // spec.block_size)
    if isinstance(spec, PackedWindowSpec):
        return min(whole, spec.kept.most_pages(length) + spec.kept.pages(chunk))
    return whole


def report(config: VllmConfig, settings: Settings, allotted: KVCacheConfig) -> None:
    """Logs what is held in which pages, and the tokens that fit, beside those of 16 bits."""
    plan = settings.plan
    for group in allotted.kv_cache_groups:
        logger.info("kvmix: %s", _described(_of_layers(group)))
    size, length = allotted.kv_cache_tensors[0].size, config.model_config.max_model_len
    tokens, _ = get_kv_cache_capacity(config, allotted)
    stock = size * length // _stock_bytes(allotted, length)
    logger.info(
        "kvmix: %.2f stored bits; %d tokens of requests of %d fit into %.2f GB, where %d would at %d bits: "
        "%.2f times as many; chunks are %s",
        plan.storage_bits,
        tokens,
        length,
        size / 1e9,
        stock,
        STOCK_BITS,
        tokens / max(1, stock),
        "exact" if settings.exact_chunks else "not exact: outputs depend on how prompts are cut, and on what is cached",
    )


def _of_layers(group: KVCacheGroupSpec) -> list[KVCacheSpec]:
    """The spec of each layer of a group: of one kind, it has one for all of them."""
    specs = list(iter_layer_specs(group.kv_cache_spec))
    return specs if len(specs) == len(group.layer_names) else specs * len(group.layer_names)


def _described(specs: list[KVCacheSpec]) -> str:
    first, layers = specs[0], f"{len(specs)} layers"
    if isinstance(first, RawSpec):
        kept = first.kept
        what = (
            f"the last {kept.window} tokens" if kept.window else f"{kept.sinks} first and {kept.recent} recent tokens"
        )
        return f"unquantized pages of {first.block_size} tokens hold {what} of {layers}"
    sizes = sum(spec.page_size_bytes for spec in specs)
    window = f" that see {first.window} tokens" if isinstance(first, PackedWindowSpec) else ""
    return f"packed pages of {first.block_size} tokens, {sizes} bytes, hold the others of {layers}{window}"


def _stock_bytes(allotted: KVCacheConfig, length: int) -> int:
    """Bytes of a request of so many tokens at 16 bits: of layers that see a window, those of as many tokens."""
    elements = 0
    for group in allotted.kv_cache_groups:
        for name, spec in zip(group.layer_names, _of_layers(group), strict=True):
            if not name.endswith(RAW):
                tokens = min(length, _window(spec) or length)
                elements += tokens * spec.num_kv_heads * (spec.head_size + spec.head_size_v)
    return elements * STOCK_BITS // 8


def _window(spec: KVCacheSpec) -> int:
    """The tokens that a layer sees; 0: all."""
    if isinstance(spec, PackedWindowSpec):
        return spec.window
    return spec.kept.window if isinstance(spec, RawSpec) else 0
