"""Which models can be tried at all: what shows without capturing one is said first."""

import torch
from torch import nn

from kvmix_compile.errors import CaptureError
from kvmix_compile.passes.capture.export import check_capturable
from kvmix_compile.passes.capture.ranks import Ranks
from kvmix_compile.passes.capture.signature import parameters_of
from kvmix_compile.runtime.model import CompiledModel

# Attributes by which a wrapper holds the module that it wraps.
_WRAPPED = ("_orig_mod", "module")


def check_model(model: object) -> None:
    """Raise CaptureError for what is no model, is compiled already, or cannot be captured for a reason that shows."""
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"the model is a {type(model).__name__}: load it first, as with "
            "transformers.AutoModelForCausalLM.from_pretrained(..)"
        )
    with Ranks.of(model).together():
        _check_module(model)


def _check_module(model: nn.Module) -> None:
    if isinstance(model, CompiledModel):
        raise CaptureError(
            f"this {type(model).__name__} was compiled by kvmix_compile already: pass the original model, which is as "
            "it was"
        )
    for name in _WRAPPED:
        if "input_ids" not in parameters_of(model.forward) and isinstance(getattr(model, name, None), nn.Module):
            raise CaptureError(f"a {type(model).__name__} wraps the model: pass model.{name}, what is inside")
    _check_weights(model)
    check_capturable(model)


def _check_weights(model: nn.Module) -> None:
    weights = list(model.parameters())
    held = (*model.named_parameters(), *model.named_buffers())
    absent = next((name for name, tensor in held if tensor.is_meta), None)
    if absent is not None:
        raise CaptureError(
            f"{absent} of the model is not in memory but offloaded, or on the meta device: load all of the "
            "model onto one device (device_map={'': 0} or {'': 'cpu'}), or onto several GPUs that it fits"
        )
    for path, module in model.named_modules():
        if any(isinstance(held, torch.ScriptObject) for held in vars(module).values()):
            raise CaptureError(
                f"{path or 'the model'} ({type(module).__name__}) keeps its weights packed for torch.ao's kernels, "
                "which cannot be captured: pass the model as it was before it was quantized"
            )
    if not any(weight.is_floating_point() for weight in weights):
        raise CaptureError(
            f"{type(model).__name__} has no floating-point parameter, so there is nothing to tell its dtype by: pass a "
            "model whose embeddings or norms at least are not quantized"
        )
