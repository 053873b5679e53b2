"""The second way in: `torch.compile(model, backend="kvmix", options={"plan": plan})`, or `{"budget": 2.3}`.

Registered with PyTorch by an entry point, so that kvmix_compile need not be imported first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.tensor import DTensor

from kvmix_compile.backend.calls import compiled_call, packs_caches
from kvmix_compile.backend.graph import StaticGraph
from kvmix_compile.backend.left import check_left, say_what_is_left
from kvmix_compile.backend.plan import Options, choose_plan
from kvmix_compile.backend.storage import packed_cache
from kvmix_compile.errors import CaptureError, KVMixError
from kvmix_compile.passes.capture.dynamo import check_whole, lower
from kvmix_compile.passes.capture.export import devices_of
from kvmix_compile.passes.match.static_cache import find_cached_sites

__all__ = ["kvmix", "packed_cache"]


@packs_caches
def kvmix(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs, its attention over a transformers StaticCache on packed keys and values.

    options: as of backend_plan.Options; by default {"budget": 2.3}.
    mode: taken, as transformers' CompileConfig passes one, and without effect.

    A graph without a KV cache goes to `options["backend"]` as it is, which is said once of a model that attends. One
    that cannot be compiled raises a KVMixError when it is called, so that Dynamo neither wraps nor suppresses it.
    """
    try:
        chosen = Options.parse(options or {})
        _check_one_device()
        if any(isinstance(given, DTensor) for given in inputs):
            raise CaptureError(
                "the model's weights are spread over processes (DTensor), which torch.compile's backend 'kvmix' does "
                "not take: call kvmix_compile.apply(model)"
            )
        compiler: Any = lookup_backend(chosen.backend)
        lowered = lower(module, inputs)
        sites = find_cached_sites(lowered)
        check_left(lowered, sites)
        if not sites:
            say_what_is_left(lowered)
            return compiler(module, inputs)
        check_whole(lowered)
        return StaticGraph(lowered, sites, choose_plan(chosen, [cached.site for cached in sites]), compiler)
    except KVMixError as error:
        return _refuse(error)


def _check_one_device() -> None:
    """Raise CaptureError for a model on several devices: accelerate's hooks break its graph at every module."""
    call = compiled_call()
    devices = devices_of(call.called) if call is not None and isinstance(call.called, nn.Module) else []
    if len(devices) > 1:
        raise CaptureError(
            f"the model's weights are on several devices ({', '.join(map(str, devices))}), which torch.compile's "
            "backend 'kvmix' does not take: call kvmix_compile.apply(model)"
        )


def _refuse(error: KVMixError) -> Callable[..., NoReturn]:
    def refuse(*inputs: Any) -> NoReturn:
        raise error

    return refuse
