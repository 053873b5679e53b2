"""Weights: what in them makes a model that cannot be compiled, found before anything is done with it."""

import torch
from torch import Tensor, nn

from kvmix_compile.kernels.ambient import as_captured
from kvmix_compile.passes.capture.ranks import Ranks
from kvmix_compile.passes.capture.shards import local_view
from kvmix_compile.passes.errors import UnsupportedModelError


@as_captured()
def check_weights(model: nn.Module) -> None:
    """Raise UnsupportedModelError, naming it, for a parameter with elements that are NaN, and for one that was made in
    inference mode, in which nothing can be measured.
    """
    with Ranks.of(model).together():
        for name, parameter in local_view(model).named_parameters():
            _check_weight(name, parameter)


def _check_weight(name: str, parameter: Tensor) -> None:
    if parameter.is_inference():
        raise UnsupportedModelError(
            f"the parameter {name} was made in torch.inference_mode(), and no gradient can be measured through it: "
            "load or make the model outside of inference mode"
        )
    if _has_nan(parameter):
        raise UnsupportedModelError(
            f"the parameter {name} has elements that are NaN, so the model's logits are no numbers: load its "
            "checkpoint again, or from another source"
        )


def _has_nan(parameter: Tensor) -> bool:
    # Weights that are stored as something else than their elements answer for themselves.
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.is_meta:
        return False
    # Reads the weights once and makes nothing of their size, as a sum of 16-bit ones in float32 would. Infinities of
    # both signs add up to NaN, too. There are no sums in 8 bits.
    total = parameter.sum(dtype=torch.float32 if parameter.itemsize == 1 else None)
    return bool(total.isnan()) and bool(parameter.isnan().any())
