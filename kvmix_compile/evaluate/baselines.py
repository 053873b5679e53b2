"""What others do, to compare with: KIVI and KVmix as published, today's opponents, and transformers' QuantizedCache."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers import PreTrainedModel, QuantizedCache

from kvmix_compile.config import RECENT_WINDOWS
from kvmix_compile.errors import InputError
from kvmix_compile.evaluate.configurations import Configuration
from kvmix_compile.evaluate.opponents import OPPONENTS
from kvmix_compile.kernels.format.precision import UNQUANTIZED_BITS
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.measure.importance import Importance

# KIVI (arXiv 2402.02750): keys and values in 2 bits, groups of 32, the last 128 tokens unquantized, no sinks.
KIVI_BITS = 2.0
KIVI_RECENT = 128
# KVmix (arXiv 2506.08018): the top 20% of layers have 3-bit keys and 4-bit values, all else 2 bits: 2.3 on average.
KVMIX_BUDGET = 2.3
# The arguments of transformers' QuantizedCache that its documentation and users give.
QUANTIZED_GROUP = 64
QUANTIZED_RECENT = 128
PACKAGES = {"quanto": ("optimum.quanto", "optimum-quanto"), "hqq": ("hqq", "hqq")}

PUBLISHED = ("kivi", "kvmix-paper")
QUANTIZED = {"quanto-4": ("quanto", 4), "quanto-2": ("quanto", 2), "hqq-2": ("hqq", 2)}
BASELINES = (*PUBLISHED, *OPPONENTS, *QUANTIZED)


@dataclass(frozen=True)
class Quantized(Configuration):
    """A transformers model with a QuantizedCache. Its recent tokens wait unquantized; the first chunk does not.

    backend: "quanto" or "hqq". bits: of a code.
    """

    backend: str
    bits: int

    @property
    def code_bits(self) -> float:
        return self.bits

    @property
    def stored_bits(self) -> float:
        # A scale and a zero point for each group, as a 16-bit model has them.
        return self.bits + 2 * UNQUANTIZED_BITS / QUANTIZED_GROUP

    @property
    def unquantized_tokens(self) -> int:
        return QUANTIZED_RECENT

    def new_cache(self) -> QuantizedCache:
        return QuantizedCache(
            self.backend, self.model.config, nbits=self.bits, q_group_size=QUANTIZED_GROUP,
            residual_length=QUANTIZED_RECENT,
        )  # fmt: skip

    def held_bits(self, cache: QuantizedCache) -> float:
        layer: Any = cache.layers[0]
        tokens, waiting = cache.get_seq_length(), layer.keys
        recent = waiting.shape[-2] if waiting.dim() == 4 else 0  # empty, it has one dimension
        return (recent * UNQUANTIZED_BITS + (tokens - recent) * self.stored_bits) / tokens


def check_baselines(names: Iterable[str], model: nn.Module) -> None:
    """Raise InputError for a name that is none of BASELINES, and for one that cannot be had with this model or in this
    environment.
    """
    for name in names:
        if name not in BASELINES:
            raise InputError(f"there is no baseline {name}; choose from {', '.join(BASELINES)}")
        if name not in PUBLISHED and not isinstance(model, PreTrainedModel):
            raise InputError(
                f"the baseline {name} is a cache of transformers, and {type(model).__name__} is no model of it"
            )
        if name in QUANTIZED:
            _check_quantized(name, model)


def published_plans(names: Iterable[str], importance: Importance) -> dict[str, Plan]:
    """The plans of those baselines that are a recipe for this project's own cache."""
    rpc_sinks, rpc_recent = RECENT_WINDOWS["rpc"]
    recipes = {
        "kivi": (replace(importance, sinks=0, recent=KIVI_RECENT), "uniform", KIVI_BITS),
        "kvmix-paper": (replace(importance, sinks=rpc_sinks, recent=rpc_recent), "kvmix", KVMIX_BUDGET),
    }
    return {
        name: measured.allocate(policy=policy, budget=bits)  # type: ignore[arg-type]
        for name, (measured, policy, bits) in recipes.items()
        if name in names
    }


def quantized_caches(names: Iterable[str], model: Any) -> list[Quantized]:
    """Those baselines that are a QuantizedCache of transformers."""
    return [Quantized(name, model, *QUANTIZED[name]) for name in names if name in QUANTIZED]


def packages(names: Iterable[str]) -> list[str]:
    """The packages, as pip calls them, that these baselines need."""
    return sorted({PACKAGES[QUANTIZED[name][0]][1] for name in names if name in QUANTIZED})


def _check_quantized(name: str, model: nn.Module) -> None:
    backend, _ = QUANTIZED[name]
    module, package = PACKAGES[backend]
    if not _installed(module):
        raise InputError(
            f"the baseline {name} needs {package}, which is not installed. Run: pip install 'kvmix-compile[baselines]'"
        )
    try:
        quantized_caches([name], model)[0].new_cache()
    except (ImportError, ValueError) as error:
        raise InputError(f"the baseline {name} cannot be had for {type(model).__name__}: {error}") from error


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module would be in
        return False
