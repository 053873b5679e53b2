"""What the numbers in a state's tensors mean: all of a StateLayout that their shapes do not tell."""

from __future__ import annotations

from dataclasses import dataclass

from kvmix_compile.kernels.format.precision import Precision


# Each is itself alone, which caches look up faster than what it consists of.
@dataclass(frozen=True, eq=False)
class Storage:
    """key, value: how packed blocks of keys and of values are stored.
    recent: the most tokens that wait in the recent window to be packed.
    window: the most tokens that one attends to, itself included; 0: all. Blocks of earlier ones may be overwritten.
    """

    key: Precision
    value: Precision
    recent: int
    window: int = 0

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values both are."""
        return self.key.is_quantized and self.value.is_quantized
