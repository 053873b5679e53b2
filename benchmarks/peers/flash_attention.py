"""The packages flash-attn, and flash_attn_interface, as FlashAttention 3 is called where it is built for Hopper."""

from collections.abc import Callable

from torch import Tensor

from benchmarks.peers.contender import Contender, Contenders


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Contenders:
    """FlashAttention 2; raises ImportError where the package is not installed."""
    from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found]

    return _with_cache("flash-attn", flash_attn_with_kvcache, q, k, v)


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Contenders:
    """FlashAttention 3; raises ImportError where the package is not installed."""
    from flash_attn_interface import flash_attn_with_kvcache  # type: ignore[import-not-found]

    return _with_cache("flash-attn-3", flash_attn_with_kvcache, q, k, v)


def _with_cache(name: str, attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Contenders:
    """Both take `[rows, tokens, heads, head_dim]` and return the same.

    Keys and values lie in memory as SDPA's do, a head's tokens side by side, and in the second as in a cache made for
    flash-attn, a token's heads side by side: for that the same memory is read as that layout, which gives other random
    numbers and takes no room.
    """
    queries = q.transpose(1, 2)
    head_major = [cache.transpose(1, 2) for cache in (k, v)]
    token_major = [cache.view(by_head.shape) for cache, by_head in zip((k, v), head_major, strict=True)]

    def contender(keys: Tensor, values: Tensor) -> Contender:
        return Contender(
            lambda: attention(queries, keys, values), lambda: (keys.transpose(1, 2), values.transpose(1, 2))
        )

    return {name: contender(*head_major), f"{name}-token-major": contender(*token_major)}
