"""Layouts whose keys have important channels, for tests that draw layouts."""

from dataclasses import replace

from hypothesis import strategies as st

from kvmix_compile.kernels.format.precision import Axis
from kvmix_compile.kernels.format.state import StateLayout

# Bits of the important tiers of the channels and of the others: halves, tiers, and a half beside two tiers.
IMPORTANT_BITS = [((2, 2), 1), ((3, 3), 2), ((8, 8), 4), ((4,), 2), ((4, 3), 2), ((4, 4, 3), 2), ((4, 3, 3), 2)]


def with_important_keys(layouts: st.SearchStrategy[StateLayout]) -> st.SearchStrategy[StateLayout]:
    """These layouts and, as often, the same with important channels where the size of the keys allows them."""
    return layouts.flatmap(lambda layout: st.just(layout) | _important(layout))


def _important(layout: StateLayout) -> st.SearchStrategy[StateLayout]:
    keys = [replace(layout.key, bits=bits, important_bits=more) for more, bits in IMPORTANT_BITS]
    storable = [key for key in keys if key.fits(layout.key_dim, Axis.TOKENS)]
    return st.sampled_from([replace(layout, key=key) for key in storable]) if storable else st.nothing()
