"""Lowering: the graph that Dynamo hands to a backend becomes an ATen graph, as export would have written it.

Dynamo speaks of functions, methods and slices; traced once more, before autograd and decompositions, the same graph is
in ATen with attention, linear maps and in-place writes still whole. So one set of matchers serves both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kvmix_compile.passes.errors import CaptureError
from kvmix_compile.passes.graph.edit import clean_up
from kvmix_compile.passes.graph.products import take_out_additions
from kvmix_compile.passes.graph.source_lines import line_of_node


@dataclass(frozen=True)
class Lowered:
    """A graph of Dynamo in ATen. Inputs and outputs are those of Dynamo's graph, in its order.

    `inputs`: the real values that Dynamo traces with. `fakes`: what stands for each in the graph: fake tensors with
    symbolic sizes, and symbols.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    fakes: tuple[Any, ...]
    fake_mode: FakeTensorMode

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph


def lower(module: fx.GraphModule, inputs: Sequence[Any]) -> Lowered:
    """Trace Dynamo's graph again, without gradients. To be called where Dynamo calls a backend; `module` is left as it
    was.
    """
    context = TracingContext.get()
    mode = context.fake_mode
    assert mode is not None
    fakes = tuple(_fake(value, mode, context) for value in inputs)

    def run(*values: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(module).run(*values)

    with mode, enable_python_dispatcher(), torch.no_grad():
        traced = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    for node in list(traced.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            traced.graph.erase_node(node)
    take_out_additions(traced.graph)
    clean_up(traced)
    return Lowered(traced, tuple(inputs), fakes, mode)


def check_whole(lowered: Lowered) -> None:
    """Raise CaptureError where the graph lacks a part of what Dynamo traced: where that ran under torch.vmap, as an
    associative scan does, tracing it again sees results that come from nowhere.
    """
    for node in lowered.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(lowered.module, node.target, None), FakeTensor):
            where = next(filter(None, map(line_of_node, node.users)), "a place that is not known")
            raise CaptureError(
                f"what the model's forward computes at {where} runs under torch.vmap, as an associative scan does, "
                "and cannot be traced twice: use kvmix_compile.apply"
            )


def _fake(value: Any, mode: FakeTensorMode, context: TracingContext) -> Any:
    """What Dynamo's own trace had in place of an input: the same symbols, so that its guards hold for them."""
    if not isinstance(value, Tensor):
        return value
    symbolic = context.tensor_to_context.get(value)
    if symbolic is None:
        return mode.from_tensor(value, static_shapes=True)
    return mode.from_tensor(value, symbolic_context=symbolic, source=symbolic.tensor_source, trace=False)
