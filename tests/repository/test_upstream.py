"""What the project relies on in transformers and PyTorch, by name: a release that moves one of them fails here, and
says which one, before anything stranger happens.
"""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import torch.distributed as distributed
import transformers
from torch.distributed.device_mesh import init_device_mesh
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvmix_compile import KVMixCache
from kvmix_compile.passes.capture.ranks import Ranks
from kvmix_compile.passes.capture.signature import CACHE_NAMES, cache_name, parameters_of

RELEASES = f"transformers {transformers.__version__}, torch {torch.__version__}"

# What is called, and the parameters that it is given by name.
CALLED: dict[str, tuple[str, ...]] = {
    # kvmix_compile/runtime/model.py: what generate passes on to forward, and what forward returns.
    "transformers:GenerationMixin.generate": ("inputs", "generation_config"),
    "transformers:GenerationMixin.prepare_inputs_for_generation": ("input_ids", "attention_mask"),
    "transformers.modeling_outputs:CausalLMOutputWithPast": ("loss", "logits"),
    # kvmix_compile/backend/layers.py replaces these methods, and Cache keeps its layers.
    "transformers.cache_utils:Cache.__init__": ("layers",),
    "transformers.cache_utils:StaticLayer.lazy_initialization": ("key_states", "value_states"),
    "transformers.cache_utils:StaticLayer.reset": (),
    "transformers.cache_utils:StaticLayer.reorder_cache": ("beam_idx",),
    "transformers.cache_utils:StaticLayer.update": ("key_states", "value_states"),
    "transformers.cache_utils:StaticSlidingWindowLayer.update": ("key_states", "value_states"),
    "transformers:StaticCache": ("config", "max_cache_len"),
    "transformers:QuantizedCache": ("backend", "config", "nbits", "q_group_size", "residual_length"),
    # passes/capture/export.py and the graphs of the backend.
    "torch.export:export": ("dynamic_shapes", "strict"),
    "torch.ops:higher_order.wrap_with_autocast": (),
    "torch.ops:higher_order.wrap_with_set_grad_enabled": (),
    "torch._ops:HigherOrderOperator": (),
    "torch.fx.experimental.proxy_tensor:make_fx": ("pre_dispatch", "_allow_non_fake_inputs"),
    "torch._subclasses.fake_tensor:FakeTensorMode": ("shape_env", "allow_non_fake_inputs"),
    "torch._subclasses.fake_tensor:FakeTensorMode.from_tensor": (
        "static_shapes", "symbolic_context", "source", "trace",
    ),
    "torch._dynamo.backends.registry:lookup_backend": (),
    "torch._dynamo.symbolic_convert:InstructionTranslator.current_tx": (),
    # kvmix_compile/backend/equality.py replaces how these are compared.
    "torch:_TorchCompileWrapper.__init__": ("options", "dynamic"),
    "transformers:CompileConfig": ("backend", "options"),
    "torch._guards:tracing": (),
    "torch._guards:TracingContext.get": (),
    "torch._inductor:compile": (),
    "torch.fx.experimental.symbolic_shapes:statically_known_true": (),
    # passes/capture/ranks.py and shards.py.
    "torch.distributed._functional_collectives:all_reduce": ("reduceOp", "group"),
    "torch.distributed._functional_collectives:AsyncCollectiveTensor.trigger_wait": (),
    "torch.ops:_c10d_functional.wait_tensor.default": (),
    # kvmix_compile/cli/loading.py.
    "transformers.distributed.configuration_utils:DistributedConfig": ("tp_size",),
    "transformers.integrations.tensor_parallel:replace_layer_number_by_wildcard": ("name",),
    # passes/rewrite/lengths.py: an expression of sizes as Python writes it.
    "torch.utils._sympy.printers:PythonPrinter": (),
}  # fmt: skip


def test_a_call_of_something_compiled_is_found_on_the_stack() -> None:
    from kvmix_compile.backend.calls import COMPILED_CALL

    assert COMPILED_CALL is not None, f"{RELEASES}: a compiled function is not called through fn and callback any more"
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_an_export_can_follow_one_path() -> None:
    assert not torch._functorch.config.fake_tensor_propagate_real_tensors


# What Cache has and KVMixCache leaves as it is: states of other kinds of layers, and what works on `layers`, of which a
# KVMixCache has none.
LEFT_ALONE = {
    "early_initialization", "get_conv_state", "get_mask_sizes", "get_query_offset", "get_recurrent_state",
    "has_previous_state", "offload", "prefetch", "update_conv_state", "update_indexer",
    "update_recurrent_state",
}  # fmt: skip


@pytest.mark.parametrize("name", CALLED)
def test_what_is_called_takes_what_it_is_given(name: str) -> None:
    try:
        function = resolve_name(name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{RELEASES}: there is no {name} any more ({error})")
    missing = set(CALLED[name]) - set(parameters_of(function)) if CALLED[name] else set()
    assert not missing, f"{RELEASES}: {name} no longer takes {', '.join(sorted(missing))}"


@pytest.mark.parametrize(
    "function", [GenerationMixin.prepare_inputs_for_generation, CausalLMOutputWithPast], ids=lambda it: it.__qualname__
)
def test_a_cache_goes_by_one_of_the_known_names(function: Callable[..., Any]) -> None:
    known = [name for name in CACHE_NAMES if name in parameters_of(function)]
    assert known == [cache_name(function)], f"{RELEASES}: {function.__qualname__} takes {parameters_of(function)}"


def test_all_that_a_cache_can_be_asked_is_answered_by_ours() -> None:
    public = {name for name in vars(Cache) if not name.startswith("_")}
    unknown = public - set(vars(KVMixCache)) - LEFT_ALONE
    assert not unknown, f"{RELEASES}: Cache has {', '.join(sorted(unknown))}, which KVMixCache does not answer"


def test_export_says_what_it_assumed_of_sizes_and_where() -> None:
    """passes/rewrite/lengths.py reads it off the environment of the symbols."""

    class Branching(torch.nn.Module):
        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            return numbers if numbers.shape[0] % 64 else 2 * numbers

    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Branching(), (torch.zeros(11),), dynamic_shapes=dynamic, strict=False)
    size = next(node for node in program.graph.nodes if node.op == "placeholder").meta["val"].shape[0]
    (guard,) = size.node.shape_env.guards
    assert guard.expr.free_symbols == {size.node.expr}, RELEASES
    assert guard.sloc.framework_loc.filename == __file__, RELEASES


def test_what_processes_add_up_is_differentiated() -> None:
    """passes/measure/recorder.py needs it, and takes it for the gradient of the sum of all processes' losses."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        ranks = Ranks(mesh=init_device_mesh("cpu", (1,)))
        given = torch.ones(3, requires_grad=True)
        (gradient,) = torch.autograd.grad((ranks.sum(given) * 2).sum(), given)
    finally:
        distributed.destroy_process_group()
    assert gradient.tolist() == [2.0, 2.0, 2.0], RELEASES
