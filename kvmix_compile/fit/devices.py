"""Devices: what of a model each of several devices holds, under transformers' own tensor and expert parallelism."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from kvmix_compile.errors import UnsupportedModelError
from kvmix_compile.fit.sketch import Sketch, SketchedSite

# What the names of transformers' styles of parallelism have in common that divide a parameter among the devices.
_DIVIDING = ("colwise", "rowwise", "grouped_gemm")


@dataclass(frozen=True)
class Share:
    """What the device holds that holds the most. weight_bytes: of its weights. cached: its part of what is cached.
    whole_layers: of how many sites it holds all heads, though there are other devices.
    """

    weight_bytes: int
    cached: Sketch
    whole_layers: int


def share(model: nn.Module, sketch: Sketch, devices: int) -> Share:
    """Of one of so many devices. KV heads are divided among them where the attention's weights are, and where there
    are fewer heads than devices each has one.

    Raises UnsupportedModelError where there are several and transformers cannot divide the model.
    """
    plan = _plan(model) if devices > 1 else {}
    if devices > 1 and not plan:
        raise UnsupportedModelError(
            f"transformers has no plan to divide {type(model).__name__} among devices: ask for --devices 1"
        )
    divided = {name for name, _ in model.named_parameters() if _is_divided(name, plan)}
    weight_bytes = sum(
        -(-parameter.nbytes // devices) if name in divided else parameter.nbytes
        for name, parameter in model.named_parameters()
    )
    sites = tuple(_of_one_device(site, devices) if _holds_any(site.layer, divided) else site for site in sketch.sites)
    whole = sum(site.kv_heads == one.kv_heads for site, one in zip(sketch.sites, sites, strict=True))
    return Share(weight_bytes, replace(sketch, sites=sites), whole if devices > 1 else 0)


def _plan(model: nn.Module) -> Mapping[str, str]:
    """The styles of parallelism, by names of modules and parameters in which * stands for a number."""
    return {**(getattr(model, "tp_plan", None) or {}), **(getattr(model, "ep_plan", None) or {})}


def _is_divided(parameter: str, plan: Mapping[str, str]) -> bool:
    """Whether a plan names a parameter, or its module, to be divided."""
    name = re.sub(r"\b\d+\b", "*", parameter)
    style = plan.get(name) or plan.get(name.rpartition(".")[0]) or ""
    return any(part in style for part in _DIVIDING)


def _holds_any(layer: str, divided: set[str]) -> bool:
    return any(name.startswith(f"{layer}.") for name in divided)


def _of_one_device(site: SketchedSite, devices: int) -> SketchedSite:
    return replace(site, shape=replace(site.shape, kv_heads=-(-site.kv_heads // devices)))
