"""Shards: what one process computes of a model whose weights transformers spread over several (tensor parallelism).

transformers makes a parameter a DTensor, of which each process holds a part, and wraps the forward of its module, by
a style that the model's plan names. torch.export captures neither. So a shadow of the model is captured, whose modules
hold this process's parts as they are, and add up over the processes what its styles say.
"""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig
from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

from kvmix_compile.passes.capture.module_tree import module_tree
from kvmix_compile.passes.capture.ranks import Ranks
from kvmix_compile.passes.errors import CaptureError

Forward = Callable[..., Any]


def local_view(model: nn.Module) -> nn.Module:
    """A shadow of the model that holds this process's part of every parameter, in the same memory; the model itself
    where nothing is spread. The model is left as it is.

    Raises CaptureError as `check_shards`.
    """
    ranks = Ranks.of(model)
    if ranks.mesh is None:
        return model
    check_shards(model)
    view, parts = module_tree(model), dict[int, nn.Parameter]()
    for module in view.modules():
        held = module._parameters.items()
        module.__dict__["_parameters"] = {name: _part(parameter, parts) for name, parameter in held}
    for name, module in view.named_modules():
        if (style := _style_of(model, name)) is not None:
            own = MethodType(type(module).forward, module)
            module.forward = STYLES[style](own, module, ranks)
    return view


def check_shards(model: nn.Module) -> None:
    """Raise CaptureError, naming it, for what is spread in a way that is not known here."""
    ranks = Ranks.of(model)
    if ranks.mesh is None:
        return
    if ranks.mesh.ndim != 1:
        raise CaptureError(
            f"the model is spread over a mesh of {ranks.mesh.ndim} dimensions: load it with tp_plan='auto' alone"
        )
    for name, parameter in model.named_parameters():
        style = _style_of(model, name) or _style_of(model, name.rpartition(".")[0])
        if isinstance(parameter, DTensor):
            _check_parameter(name, parameter, style, ranks)
            _check_heads(name, parameter, style, model, ranks)
    for name, module in model.named_modules():
        style = _style_of(model, name)
        if style is not None:
            _check_module(name, module, style)


def _check_parameter(name: str, parameter: DTensor, style: str | None, ranks: Ranks) -> None:
    if style is None:
        raise CaptureError(
            f"the parameter {name} is spread over processes otherwise than by the model's tp_plan: load the model with "
            "tp_plan='auto' alone"
        )
    if style not in STYLES:
        raise _unknown(name, style)
    if parameter.to_local().numel() not in (parameter.numel(), parameter.numel() / ranks.count):
        raise CaptureError(
            f"the parameter {name}, {list(parameter.shape)}, is not spread evenly over {ranks.count} processes: start "
            "as many as divide it"
        )


def _check_heads(name: str, parameter: DTensor, style: str | None, model: nn.Module, ranks: Ranks) -> None:
    """Raise CaptureError for a projection to keys or values whose heads would be cut: so many rows stay in parts."""
    config = getattr(model, "config", None)
    if style != "colwise" or not isinstance(config, PreTrainedConfig):
        return
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None)
    if not isinstance(heads, int) or heads % ranks.count == 0:
        return
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if parameter.shape[0] == heads * head_dim:
        raise CaptureError(
            f"the {heads} heads that {name} projects to cannot be spread evenly over {ranks.count} processes: start as "
            "many as divide them"
        )


def _check_module(name: str, module: nn.Module, style: str) -> None:
    if style not in STYLES:
        raise _unknown(name, style)
    if style in _OF_LINEAR and type(module).forward is not nn.Linear.forward:
        raise CaptureError(
            f"{name} is a {type(module).__name__}, which is no plain linear layer, and its weights are spread over "
            f"processes ({style}): load the model without quantized weights or adapters, or on one device"
        )


def _unknown(name: str, style: str) -> CaptureError:
    return CaptureError(
        f"{name} is spread over processes in a way that kvmix_compile does not know ({style}): load the model with "
        "another tp_plan, or on one device"
    )


def _style_of(model: nn.Module, name: str) -> str | None:
    """By what style the plan spreads the module or parameter of this name; None where it does not."""
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    return plan.get(replace_layer_number_by_wildcard(name))


def _part(parameter: nn.Parameter | None, parts: dict[int, nn.Parameter]) -> nn.Parameter | None:
    """This process's part of a parameter; the same one for weights that are tied."""
    if not isinstance(parameter, DTensor):
        return parameter
    if id(parameter) not in parts:
        parts[id(parameter)] = nn.Parameter(parameter.detach().to_local(), requires_grad=False)
    return parts[id(parameter)]


# What becomes of a module's forward, by the style that transformers knows its plan's entry by
# (transformers.distributed.tensor_parallel.ALL_PARALLEL_STYLES).


def _as_it_is(own: Forward, module: nn.Module, ranks: Ranks) -> Forward:
    """Of parts of the weights, or of whole ones: nothing is exchanged."""
    return own


def _added_up(own: Forward, module: nn.Module, ranks: Ranks) -> Forward:
    return lambda *args, **kwargs: ranks.sum(own(*args, **kwargs))


def _of_part_of_input(own: Forward, module: nn.Module, ranks: Ranks) -> Forward:
    """A linear map whose input features are spread, and come so."""
    linear = cast(nn.Linear, module)

    def forward(x: Tensor) -> Tensor:
        summed = ranks.sum(F.linear(x, linear.weight))
        return summed if linear.bias is None else summed + linear.bias

    return forward


def _of_whole_input(own: Forward, module: nn.Module, ranks: Ranks) -> Forward:
    """The same, where they come whole."""
    of_part = _of_part_of_input(own, module, ranks)
    return lambda x: of_part(x[..., ranks.part_of(x.shape[-1])])


def _gathered(own: Forward, module: nn.Module, ranks: Ranks) -> Forward:
    """What is made of each part, one behind the other. Added up, with zeros in the places of the others' parts."""

    def forward(x: Tensor) -> Tensor:
        part = own(x)
        own_place = ranks.part_of(part.shape[-1] * ranks.count)
        behind = part.shape[-1] * ranks.count - own_place.stop
        return ranks.sum(F.pad(part, (own_place.start, behind)))

    return forward


def _of_part_of_vocabulary(own: Forward, module: nn.Module, ranks: Ranks) -> Forward:
    """An embedding of this process's tokens, and zeros for the others'."""
    embedding = cast(nn.Embedding, module)
    embedding.padding_idx = None  # for gradients of the weights alone, and it may be another process's

    def forward(ids: Tensor) -> Tensor:
        rows = embedding.weight.shape[0]
        within = ids - ranks.number * rows
        is_others = (within < 0) | (within >= rows)
        return ranks.sum(own(within.clamp(0, rows - 1)).masked_fill(is_others[..., None], 0))

    return forward


def _divided(own: Forward, module: nn.Module, ranks: Ranks) -> Forward:
    """What every process gives alike, and is added up later."""
    return lambda x, *args, **kwargs: own(x / ranks.count, *args, **kwargs)


STYLES: Mapping[str, Callable[[Forward, nn.Module, Ranks], Forward]] = {
    "colwise": _as_it_is,
    "packed_colwise": _as_it_is,
    "packed_rowwise": _as_it_is,
    "local_params": _as_it_is,
    "mla_kv_a_proj": _as_it_is,
    "replicate": _as_it_is,
    "replicated_with_grad_allreduce": _as_it_is,
    "rowwise": _of_part_of_input,
    "rowwise_rep": _of_whole_input,
    "rowwise_split_input": _of_whole_input,
    "colwise_rep": _gathered,
    "colwise_gather_output": _gathered,
    "embedding_colwise": _gathered,
    "embedding_rowwise": _of_part_of_vocabulary,
    "all_reduce": _added_up,
    "moe_tp_experts": _added_up,
    "moe_identity_expert": _divided,
}

# Those of modules that must be linear layers, as what they compute is taken apart.
_OF_LINEAR = frozenset({"rowwise", "rowwise_rep", "rowwise_split_input"})
