"""Layouts whose keys have important channels, for tests that draw layouts."""

from dataclasses import replace

from hypothesis import strategies as st

from kvmix_compile.kernels.precision import CHANNEL_MULTIPLE
from kvmix_compile.kernels.state import StateLayout

# Bits of the important channels and of the others.
IMPORTANT_BITS = [(2, 1), (3, 2), (4, 2), (4, 3), (8, 4)]


def with_important_keys(layouts: st.SearchStrategy[StateLayout]) -> st.SearchStrategy[StateLayout]:
    """These layouts and, as often, the same with important channels where the size of the keys allows them."""
    return layouts.flatmap(lambda layout: st.just(layout) | _important(layout))


def _important(layout: StateLayout) -> st.SearchStrategy[StateLayout]:
    if layout.key_dim % (2 * CHANNEL_MULTIPLE):
        return st.nothing()
    return st.sampled_from(
        [replace(layout, key=replace(layout.key, bits=bits, important_bits=more)) for more, bits in IMPORTANT_BITS]
    )
