"""Layouts of sites, as plans give them."""

from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import StateLayout, unpacked_tokens


def layout(key_bits: int = 2, window: int = 0, sinks: int = 64, recent: int = 128) -> StateLayout:
    """One of three heads of 64 channels, in SmolLM2's size."""
    sinks, recent = unpacked_tokens(window, sinks, recent)
    key, value = Precision(key_bits, 32, 4), Precision(2, 64, 4)
    return StateLayout(SiteShape(3, 64, 64, window), key=key, value=value, sinks=sinks, recent=recent)


def layouts(count: int = 30, **options: int) -> dict[str, StateLayout]:
    """Of so many layers, which differ in their bits."""
    return {f"layers.{number}": layout(key_bits=(1, 2, 2, 3, 4)[number % 5], **options) for number in range(count)}
