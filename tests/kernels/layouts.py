"""Layouts of states, as tests draw them."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from kvmix_compile.kernels.format.precision import Axis, Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import StateLayout

WINDOWS = (0, 0, 1, 40, 100)
# Bits of the important tiers of the channels and of the others: halves, tiers, and a half beside two tiers.
IMPORTANT_BITS = [((2, 2), 1), ((3, 3), 2), ((8, 8), 4), ((4,), 2), ((4, 3), 2), ((4, 4, 3), 2), ((4, 3, 3), 2)]


def with_important_keys(layouts: st.SearchStrategy[StateLayout]) -> st.SearchStrategy[StateLayout]:
    """These layouts and, as often, the same with important channels where the size of the keys allows them."""
    return layouts.flatmap(lambda layout: st.just(layout) | _important(layout))


def _important(layout: StateLayout) -> st.SearchStrategy[StateLayout]:
    keys = [replace(layout.key, bits=bits, important_bits=more) for more, bits in IMPORTANT_BITS]
    storable = [key for key in keys if key.fits(layout.key_dim, Axis.TOKENS)]
    return st.sampled_from([replace(layout, key=key) for key in storable]) if storable else st.nothing()


def drawn_layouts(
    key: st.SearchStrategy[Precision],
    value: st.SearchStrategy[Precision],
    *,
    key_dims: Sequence[int],
    value_dims: Sequence[int],
    sinks: Sequence[int],
    recent: Sequence[int],
    windows: Sequence[int] = WINDOWS,
) -> st.SearchStrategy[StateLayout]:
    """Of one or two heads, with and without rollback."""
    shape = st.builds(
        SiteShape,
        kv_heads=st.sampled_from([1, 2]),
        key_dim=st.sampled_from(key_dims),
        value_dim=st.sampled_from(value_dims),
        window=st.sampled_from(windows),
    )
    return st.builds(
        StateLayout,
        shape,
        key=key,
        value=value,
        sinks=st.sampled_from(sinks),
        recent=st.sampled_from(recent),
        rollback=st.sampled_from([0, 7]),
    )


def with_window(layout: StateLayout, window: int) -> StateLayout:
    """The same where a token attends to `window` tokens; 0: to all."""
    return replace(layout, shape=replace(layout.shape, window=window))
