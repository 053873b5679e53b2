"""Opponents: what others store in 2 to 4 bits today, simulated at equal attention sinks and recent tokens."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from kvmix_compile.evaluate.quantizers import Q4_0_BLOCK, clipped, q4_0, turbo, variance_normalized
from kvmix_compile.evaluate.simulated import Simulated, Stored
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.passes.allocate.policies import SiteImportance
from kvmix_compile.passes.measure.importance import Importance

# Orthogonal matrices of the heads of one layer's keys and values, float32 [kv_heads, dim, dim] each.
Rotations = tuple[Tensor, Tensor]
Layer = tuple[Stored, Stored]

# Scales, zero points and norms are float16.
NUMBER_BITS = 16
# KVarN's tile, and what it ships: 4-bit keys and 2-bit values.
KVARN_TILE = 128
KVARN_BITS = (4, 2)
# OSCAR's bits, and the shares of a vector's elements that stay as they are.
OSCAR_BITS = 2
OSCAR_KEPT = (0.96, 0.92)


def simulated_caches(
    names: Iterable[str], model: Any, importance: Importance, rotations: Callable[[], Sequence[Rotations]]
) -> list[Simulated]:
    """Those baselines that are an opponent. rotations: of each site, asked for where one needs them."""
    return [_simulated(name, model, importance, rotations) for name in names if name in OPPONENTS]


def _simulated(
    name: str, model: Any, importance: Importance, rotations: Callable[[], Sequence[Rotations]]
) -> Simulated:
    if name == OSCAR:
        layers = [_oscar(site, *pair) for site, pair in zip(importance.sites, rotations(), strict=True)]
    else:
        layers = [UNCALIBRATED[name](site) for site in importance.sites]
    keys, values = zip(*layers, strict=True)
    tile = KVARN_TILE if name == "kvarn-k4v2" else BLOCK_TOKENS
    return Simulated(
        name, model, keys=keys, values=values, tile=tile, sinks=importance.sinks, recent=importance.recent
    )  # fmt: skip


def _q4_0(site: SiteImportance) -> Layer:
    def side(dim: int) -> Stored:
        block = Q4_0_BLOCK if dim % Q4_0_BLOCK == 0 else dim
        return Stored(q4_0, bits=4, stored_bits=4 + NUMBER_BITS / block)

    return side(site.key_dim), side(site.value_dim)


def _turbo(site: SiteImportance, bits: int) -> Layer:
    quantizer = partial(turbo, bits=bits)
    key, value = (
        Stored(quantizer, bits=bits, stored_bits=bits + NUMBER_BITS / dim) for dim in (site.key_dim, site.value_dim)
    )
    return key, value


def _kvarn(site: SiteImportance) -> Layer:
    key_bits, value_bits = KVARN_BITS
    # A scale and a zero point of each group, and a number of each row of the other direction.
    of_key = 2 * NUMBER_BITS / KVARN_TILE + NUMBER_BITS / site.key_dim
    of_value = 2 * NUMBER_BITS / site.value_dim + NUMBER_BITS / KVARN_TILE
    return (
        Stored(partial(variance_normalized, bits=key_bits, keys=True), key_bits, key_bits + of_key),
        Stored(partial(variance_normalized, bits=value_bits, keys=False), value_bits, value_bits + of_value),
    )


def _oscar(site: SiteImportance, key_rotation: Tensor, value_rotation: Tensor) -> Layer:
    key, value = (
        Stored(
            partial(clipped, bits=OSCAR_BITS, rotation=rotation, kept=kept),
            bits=OSCAR_BITS,
            stored_bits=OSCAR_BITS + 2 * NUMBER_BITS / rotation.shape[-1],
        )
        for rotation, kept in zip((key_rotation, value_rotation), OSCAR_KEPT, strict=True)
    )
    return key, value


OSCAR = "oscar-2"
UNCALIBRATED: Mapping[str, Callable[[SiteImportance], Layer]] = {
    "q4_0-hadamard": _q4_0,
    "kvarn-k4v2": _kvarn,
    "turboquant-4": partial(_turbo, bits=4),
    "turboquant-3": partial(_turbo, bits=3),
}
OPPONENTS = (*UNCALIBRATED, OSCAR)
