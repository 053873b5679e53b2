"""Layouts of states made of others."""

from dataclasses import replace

from kvmix_compile.kernels.format.state import StateLayout


def with_window(layout: StateLayout, window: int) -> StateLayout:
    """The same where a token attends to `window` tokens; 0: to all."""
    return replace(layout, shape=replace(layout.shape, window=window))
