"""The modes around a call that PyTorch takes from wherever it is made: gradients, inference mode, autocast.

What a compiled model computes and what its cache holds must not depend on them. A graph has the dtypes that it was
captured with, and a tensor made in inference mode could not be written to outside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Without gradients and outside inference mode: what is made here may be written to anywhere."""
    # Leaving inference mode alone would turn gradients on.
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def as_captured() -> Iterator[None]:
    """As graphs are captured, measured and run: without gradients, outside inference mode, and without autocast, so
    that every tensor has the dtype that the graph gives it.
    """
    with ordinary_tensors(), _without_autocast(autocast_devices()):
        yield


def autocast_devices() -> list[str]:
    """The types of devices that autocast is on for."""
    accelerator = torch.accelerator.current_accelerator()
    types = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return [kind for kind in types if torch.is_autocast_enabled(kind)]


@contextmanager
def _without_autocast(types: list[str]) -> Iterator[None]:
    if not types:
        yield
        return
    with torch.autocast(types[0], enabled=False), _without_autocast(types[1:]):
        yield
