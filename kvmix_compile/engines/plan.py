"""Engine plan: the format in which each layer of a serving engine keeps its keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvmix_compile.errors import PlanError
from kvmix_compile.kernels.format.precision import UNQUANTIZED_BITS
from kvmix_compile.kernels.format.shape import Shaped, SiteShape
from kvmix_compile.passes.allocate.policies import Unit
from kvmix_compile.passes.allocate.whole_layers import CacheFormat, held_bits


@dataclass(frozen=True)
class EngineLayer(Shaped):
    """names: of the attention that keeps keys and values, and of later ones that read them. kept: None: at 16 bits."""

    names: tuple[str, ...]
    shape: SiteShape
    kept: CacheFormat | None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layer's number in the model, as engines read it off its name, and those of later ones that read it.

        Raises PlanError for a name that has none, or several.
        """
        return tuple(map(layer_number, self.names))


@dataclass(frozen=True)
class EnginePlan:
    """layers: in the order of the model. context: tokens of the texts that its bits are averaged over; 0: of any."""

    layers: tuple[EngineLayer, ...]
    context: int = 0

    @property
    def formats(self) -> tuple[CacheFormat, ...]:
        """Those that there are, each once."""
        return tuple(dict.fromkeys(layer.kept for layer in self.layers if layer.kept is not None))

    @property
    def skipped(self) -> tuple[EngineLayer, ...]:
        """The layers at 16 bits."""
        return tuple(layer for layer in self.layers if layer.kept is None)

    @property
    def code_bits(self) -> float:
        """Of an element of keys and values, scales not counted."""
        return self._mean_bits("budget")

    @property
    def stored_bits(self) -> float:
        """Of an element of keys and values, scales counted."""
        return self._mean_bits("storage_budget")

    def _mean_bits(self, unit: Unit) -> float:
        taken = sum(held_bits(layer, layer.kept, unit, self.context) for layer in self.layers)
        return UNQUANTIZED_BITS * taken / sum(held_bits(layer, None, unit, self.context) for layer in self.layers)


def layer_number(name: str) -> int:
    """3 of "model.layers.3.self_attn". Raises PlanError for a name that has no number, or several."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise PlanError(
            f"engines tell layers by the number in their names, and {name} has {len(numbers) or 'none'}: this model's "
            "layers cannot be named to them"
        )
    return numbers[0]


def numbers_of(layers: Sequence[EngineLayer]) -> tuple[int, ...]:
    """Of all these layers, ascending."""
    return tuple(sorted({number for layer in layers for number in layer.numbers}))
