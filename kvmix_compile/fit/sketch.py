"""Sketch: what a model caches of a token and carries besides, found in as few of its layers as show it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from kvmix_compile.compiler import find_in
from kvmix_compile.errors import CaptureError
from kvmix_compile.fit.layers import Layers, find_layers
from kvmix_compile.kernels.ambient import as_captured
from kvmix_compile.kernels.format.shape import Shaped, SiteShape
from kvmix_compile.model_check import check_model
from kvmix_compile.passes.capture.export import capture
from kvmix_compile.report import Report


@dataclass(frozen=True)
class SketchedSite(Shaped):
    """An attention site of a model. layer: its name. dtype: of its keys and values."""

    layer: str
    shape: SiteShape
    dtype: torch.dtype


@dataclass(frozen=True)
class SketchedState:
    """What a layer carries from token to token besides keys and values. row_bytes: of a row, whatever its length."""

    layer: str
    row_bytes: int


@dataclass(frozen=True)
class Sketch:
    """What a model keeps of its past. longest_context: the tokens that it takes; None: any number."""

    sites: tuple[SketchedSite, ...]
    carried: tuple[SketchedState, ...]
    longest_context: int | None


Found = TypeVar("Found", SketchedSite, SketchedState)


@as_captured()
def sketch(model: nn.Module) -> Sketch:
    """What a model keeps of its past, from its first layers alone where the others are of the same kinds (layers.py).

    Raises CaptureError or UnsupportedModelError where it cannot be given a compressed cache.
    """
    check_model(model)
    layers = find_layers(model)
    if layers is not None and layers.few < len(layers.modules):
        extended = _from_few(model, layers)
        if extended is not None:
            return extended
    return _sketched(model)


def _from_few(model: nn.Module, layers: Layers) -> Sketch | None:
    """None where the model does not run with a few layers, or where two of a kind are found to differ."""
    try:
        with layers.shortened():
            found = _sketched(model)
    except CaptureError:
        return None
    sites = _in_all_layers(found.sites, layers)
    carried = _in_all_layers(found.carried, layers)
    return None if sites is None or carried is None else replace(found, sites=sites, carried=carried)


def _sketched(model: nn.Module) -> Sketch:
    found = find_in(capture(model), Report(type(model).__name__))
    return Sketch(
        sites=tuple(
            SketchedSite(site.layer, site.shape, dtype) for site, dtype in zip(found.sites, found.dtypes, strict=True)
        ),
        carried=tuple(SketchedState(one.carried.layer, one.carried.row_bytes) for one in found.captured.stateful),
        longest_context=found.captured.longest_context,
    )


def _in_all_layers(found: Sequence[Found], layers: Layers) -> tuple[Found, ...] | None:
    """What was found in the first few layers, and the same in all others of their kinds; None where two layers of a
    kind differ.
    """
    outside: list[Found] = []
    within: list[list[Found]] = [[] for _ in range(layers.few)]
    for one in found:
        place = layers.place(one.layer)
        if place is None:
            outside.append(one)
        else:
            index, rest = place
            within[index].append(replace(one, layer=rest))
    of_kind: dict[Hashable, list[Found]] = {}
    for kind, in_layer in zip(layers.kinds, within, strict=False):
        if of_kind.setdefault(kind, in_layer) != in_layer:
            return None
    extended = [
        replace(one, layer=".".join(filter(None, (layers.path, str(index), one.layer))))
        for index, kind in enumerate(layers.kinds)
        for one in of_kind[kind]
    ]
    return tuple(outside + extended)
