"""Weightless: a model as its configuration describes it, whose weights take no memory.

All of its parameters are views of one array of zeros that nothing writes to, so that the operating system gives it no
memory. Shapes, dtypes and the last two strides are those of the model, and its buffers are its own. So it is captured,
and its sites are found, as those of any model: what is found does not depend on weights. What it says does.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvmix_compile.errors import UnsupportedModelError

META = torch.device("meta")
# What makes tensors of a given size.
_MAKERS = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
# Elements. Some models fill their experts with zeros, which takes time and memory; buffers are not that large.
LARGE = 2**24


def weightless(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The causal language model of this configuration in evaluation mode, on the CPU, its weights zeros of `dtype`.

    Raises ValueError where transformers has no causal language model for it, UnsupportedModelError where the model
    keeps tensors besides its weights that it expects to load.
    """
    with _unallocated():
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise UnsupportedModelError(
                f"{type(model).__name__} loads {name} from its checkpoint, and what depends on that cannot be worked "
                "out from a configuration: load the model, and call kvmix_compile.diagnose"
            )
    _set_to_zeros(model)
    return model.eval()


class _WithoutElements(TorchFunctionMode):
    """Tensors that are made as weights are, without being filled or large, are on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func in _MAKERS and options.get("device") is None:
            made = func(*args, **{**options, "device": META})
            if func is torch.empty or made.numel() >= LARGE:
                return made
        return func(*args, **options)


@contextmanager
def _unallocated() -> Iterator[None]:
    """Parameters of the modules that are made within are on the meta device, buffers where they would be."""

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return parameter if parameter is None or parameter.is_meta else nn.Parameter(parameter.to(META))

    # Its annotation has hooks return nothing; what they return takes the parameter's place.
    handle = register_module_parameter_registration_hook(cast(Any, moved))
    try:
        with _WithoutElements():
            yield
    finally:
        handle.remove()


def _set_to_zeros(model: nn.Module) -> None:
    """In place. What shares a parameter goes on to do so."""
    parameters = list(model.parameters())
    largest = max((_matrix_bytes(parameter) for parameter in parameters), default=0)
    # Not torch.zeros, which writes its zeros.
    zeros = torch.from_numpy(numpy.zeros(largest, dtype=numpy.uint8))
    of_parameter = {parameter: _zeros_like(parameter, zeros) for parameter in parameters}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, of_parameter[parameter])


def _zeros_like(parameter: nn.Parameter, zeros: Tensor) -> nn.Parameter:
    matrix = zeros[: _matrix_bytes(parameter)].view(parameter.dtype).view(parameter.shape[-2:])
    return nn.Parameter(matrix.expand(parameter.shape), requires_grad=False)


def _matrix_bytes(parameter: nn.Parameter) -> int:
    """Of its last two axes, which grouped products want to be whole in memory."""
    return math.prod(parameter.shape[-2:]) * parameter.dtype.itemsize
