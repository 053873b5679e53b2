"""Capture: a model becomes one graph of `(input_ids, position_ids, logit_positions) -> logits`, without a cache.

The graph is made by `torch.export` (non-strict), batch and sequence dynamic. Parameters and buffers are read from the
live model through `get_attr` nodes, so that nothing is copied and `model.to(device)` is followed.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from kvmix_compile.kernels.ambient import as_captured
from kvmix_compile.passes.capture.captured import MODEL, Captured
from kvmix_compile.passes.capture.logits import select_early
from kvmix_compile.passes.capture.randomness import refuse_randomness
from kvmix_compile.passes.capture.ranks import Ranks
from kvmix_compile.passes.capture.regions import inline_regions
from kvmix_compile.passes.capture.shards import check_shards, local_view
from kvmix_compile.passes.capture.signature import parameters_of
from kvmix_compile.passes.capture.single_nodes import StatefulModule, give_modules, noted
from kvmix_compile.passes.capture.stateful import find_stateful
from kvmix_compile.passes.errors import CaptureError
from kvmix_compile.passes.graph.buffers import assemble_at_once
from kvmix_compile.passes.graph.edit import clean_up
from kvmix_compile.passes.graph.moves import align_indices, share_moves
from kvmix_compile.passes.graph.products import take_out_additions
from kvmix_compile.passes.graph.record import recorded
from kvmix_compile.passes.graph.source_lines import line_of_bound
from kvmix_compile.passes.graph.vocabulary import graph_inputs
from kvmix_compile.passes.untouched.first_run import added_since, make_real, names_held
from kvmix_compile.passes.untouched.reads import Reads, recorded_reads
from kvmix_compile.passes.untouched.untouched import Written, untouched
from kvmix_compile.passes.untouched.writes import write_to_copies

# Sizes of the example input. Distinct and larger than one, so that no two dimensions are taken for the same
# and none is specialised as a broadcast.
EXAMPLE_BATCH, EXAMPLE_TOKENS, EXAMPLE_LOGITS = 3, 11, 5


# No sequence is longer; export's own infinity compares as larger.
UNLIMITED = 2**31


class _LogitsOnly(nn.Module):
    """What is exported: the model called without a cache, giving nothing but the logits asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.parameters_taken = frozenset(parameters_of(model.forward))

    def forward(self, input_ids: Tensor, position_ids: Tensor, logit_positions: Tensor) -> Tensor:
        options: dict[str, object] = {}
        if "position_ids" in self.parameters_taken:
            options["position_ids"] = position_ids
        if "use_cache" in self.parameters_taken:
            options["use_cache"] = False
        if "logits_to_keep" in self.parameters_taken:
            options["logits_to_keep"] = logit_positions
        logits = logits_of(self.model(input_ids, **options))
        return logits if "logits_to_keep" in options else logits[:, logit_positions]


def logits_of(output: object) -> Tensor:
    """The logits in what a model returned: a tensor, a tuple that begins with one, or an object with `.logits`."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise CaptureError(
            f"the model returned {type(output).__name__}, in which there are no logits: pass a causal language model "
            "whose forward returns logits, a tuple that begins with them, or an object with `.logits`"
        )
    return logits


def capture(model: nn.Module) -> Captured:
    """Export `model`, in evaluation mode, as one graph with dynamic batch and sequence.

    Whatever modes are on, it is exported without gradients, outside inference mode and without autocast.

    Raises:
        CaptureError: the model is training, is an encoder-decoder, or cannot be exported with a dynamic sequence.
    """
    check_capturable(model)
    original, model = model, local_view(model)
    stateful = find_stateful(model)
    before = names_held(model)
    with untouched(model) as written:
        wrapper = _LogitsOnly(model).eval()
        with noted(model, stateful), recorded_reads(model, written) as reads:
            program = _export(model, wrapper, stateful)
        added = added_since(before)
    captured = _captured(program, wrapper, stateful, reads, written, original)
    make_real(model, added, lambda tokens: wrapper(*_example(model, 1, tokens, tokens)))
    return captured


def _example(model: nn.Module, batch: int, tokens: int, logits: int) -> tuple[Tensor, Tensor, Tensor]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    positions = torch.arange(tokens, device=device)
    return (
        torch.zeros(batch, tokens, dtype=torch.int64, device=device),
        positions.expand(batch, -1).contiguous(),
        positions[:logits].clone(),
    )


def _export(model: nn.Module, wrapper: "_LogitsOnly", stateful: Sequence[StatefulModule]) -> ExportedProgram:
    example = _example(model, EXAMPLE_BATCH, EXAMPLE_TOKENS, EXAMPLE_LOGITS)
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    try:
        # Under no_grad the regions that transformers marks with @torch.no_grad() need no subgraph of their own.
        with as_captured(), warnings.catch_warnings():
            # What the forward assigns is put back.
            warnings.filterwarnings("ignore", "The tensor attribute")
            return torch.export.export(
                wrapper, example, dynamic_shapes=(dynamic, dynamic, {0: Dim.DYNAMIC}), strict=False
            )
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export could not capture {type(model).__name__} ({first_line(error)}): "
            f"{_advice(model, stateful, error)}"
        ) from error


def _advice(model: nn.Module, stateful: Sequence[StatefulModule], error: Exception) -> str:
    """What to say of a model that cannot be exported: most have a state besides keys and values, and a loop over it,
    which is not one of a stateful module.
    """
    not_traced = tuple(f"{one.path}." for one in stateful)
    mixing = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.RNNBase) and not name.startswith(not_traced)
    ]
    if len(devices_of(model)) > 1 and "device" in str(error):
        return (
            "its forward mixes tensors of several devices, as where a device_map puts parts of one layer on different "
            "ones: give each layer one device, as device_map='auto' does"
        )
    if mixing:
        more = f" and {len(mixing) - 1} more" if len(mixing) > 1 else ""
        return f"it mixes tokens otherwise than by attention, in {mixing[0]}{more}, which is not supported"
    return (
        "the model's forward must take token ids and return logits, with no control flow that depends on their values "
        "or on the sequence length"
    )


def check_capturable(model: nn.Module) -> None:
    """Raise CaptureError for a model that is not captured, for a reason that shows without trying."""
    if model.training:
        raise CaptureError("the model is in training mode: call `model.eval()` first, so that dropout is off")
    for name, module in model.named_modules():
        if module.training and isinstance(module, nn.Dropout) and module.p:
            raise CaptureError(f"{name} is in training mode: call `model.eval()` first, so that dropout is off")
    devices = devices_of(model)
    if len(devices) > 1 and not hasattr(model, "hf_device_map"):
        raise CaptureError(
            f"the model is spread over {', '.join(map(str, devices))} without a device_map: load it with "
            "from_pretrained(.., device_map='auto'), or move it to one device"
        )
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError(
            f"{type(model).__name__} is an encoder-decoder; kvmix_compile compresses decoder-only causal language "
            "models: generate with the original"
        )
    if "input_ids" not in parameters_of(model.forward)[:1]:
        raise CaptureError(
            f"{type(model).__name__}.forward takes no `input_ids`; kvmix_compile needs a model that maps token ids "
            "to logits: where this one wraps another, pass that"
        )
    check_shards(model)


def devices_of(model: nn.Module) -> list[torch.device]:
    """Those that a model's weights lie on, that of its first weight first."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def first_line(error: Exception) -> str:
    """The first sentence of an error of PyTorch, for a message of one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].partition("! For more information")[0].partition(".  ")[0] if lines else type(error).__name__


def _captured(
    program: ExportedProgram,
    wrapper: _LogitsOnly,
    stateful: Sequence[StatefulModule],
    reads: Reads,
    written: Written,
    original: nn.Module,
) -> Captured:
    exported = program.graph_module
    passes = [recorded("regions", exported, lambda: inline_regions(exported))[0]]
    refuse_randomness(exported.graph)
    module = _of_inputs_alone(program, wrapper.model)
    give_modules(module, wrapper.model, stateful)
    passes += [
        recorded("products", module, lambda: take_out_additions(module.graph))[0],
        recorded("writes", module, lambda: write_to_copies(module))[0],
        recorded("clean up", module, lambda: clean_up(module))[0],
        recorded("buffers", module, lambda: assemble_at_once(module.graph))[0],
    ]
    if "logits_to_keep" not in wrapper.parameters_taken:
        passes.append(recorded("logits", module, lambda: select_early(module.graph))[0])
    if len(devices_of(wrapper.model)) > 1:
        align_indices(module.graph)
        passes.append(recorded("moves", module, lambda: share_moves(module.graph))[0])
        module.graph.eliminate_dead_code()
    module.recompile()
    input_ids = next(node for node in graph_inputs(module.graph) if node.name == "input_ids")
    batch, tokens = input_ids.meta["val"].shape
    if (most := _bound(program, batch, "batch")) is not None:
        raise CaptureError(
            f"the model's forward takes another path for a batch beyond {most}, at {line_of_bound(batch)}; it must "
            "take any batch"
        )
    return Captured(
        module=module,
        batch=batch,
        tokens=tokens,
        most_tokens=_bound(program, tokens, "sequence"),
        has_position_input="position_ids" in wrapper.parameters_taken,
        reads=reads,
        written=written,
        original=original,
        ranks=Ranks.of(original),
        passes=tuple(passes),
    )


def _of_inputs_alone(program: ExportedProgram, model: nn.Module) -> fx.GraphModule:
    """The program as a module that takes what its user gives and returns logits: weights, buffers and constants, which
    export makes inputs too, become attributes.
    """
    graph, root = program.graph_module.graph, nn.Module()
    root.add_module(MODEL, model)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for spec, node in zip(program.graph_signature.input_specs, placeholders, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            continue
        if not node.users:
            graph.erase_node(node)
            continue
        if spec.kind == InputKind.CUSTOM_OBJ:
            raise CaptureError(
                f"the model's forward uses an object that no graph can hold: keep {spec.target} out of it"
            )
        assert spec.target is not None
        target = spec.target
        if spec.kind == InputKind.CONSTANT_TENSOR:
            target = target.replace(".", "_")
            root.register_buffer(target, program.constants[spec.target], persistent=False)
        with graph.inserting_before(node):
            attribute = graph.create_node("get_attr", target)
            attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (output.args[0][0],)
    return bind(root, graph)


def bind(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule whose attributes are `root`'s own submodules and buffers, not copies of the tensors that it
    reads.
    """
    module = fx.GraphModule(nn.Module(), fx.Graph())
    for name, child in root.named_children():
        module.add_module(name, child)
    for name, buffer in root.named_buffers(recurse=False):
        module.register_buffer(name, buffer, persistent=False)
    module.graph = graph
    return module


def _bound(program: ExportedProgram, size: torch.SymInt | int, name: str) -> int | None:
    """The largest size for which the graph holds; None where there is no limit."""
    if isinstance(size, int):
        raise CaptureError(f"the model's forward works only for a {name} of {size}; it must take any {name}")
    bounds = program.range_constraints.get(size.node.expr)
    return int(bounds.upper) if bounds is not None and bounds.upper < UNLIMITED else None
