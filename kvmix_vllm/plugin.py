"""The plugin: where vLLM is told of all this.

vLLM calls `register` in each of its processes, long before it knows what is to be served. So only a few of its own
functions are wrapped here, each does what it did, and what they are asked for decides whether anything else is done.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmix_vllm.settings import Settings

_WRAPPED = "wrapped_by_kvmix"


def register() -> None:
    """The entry point `vllm.general_plugins`. May be called more than once."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    _wrap(EngineArgs, "create_engine_config", _checked)
    _wrap(Executor, "get_kv_cache_specs", _with_managers)
    _wrap(WorkerWrapperBase, "init_device", _with_layers)
    _wrap(WorkerWrapperBase, "initialize_from_config", _reported)


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Has `wrapper` called with the function and what the function is called with."""
    function = getattr(owner, name)
    if hasattr(function, _WRAPPED):
        return

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(function, *args, **kwargs)

    setattr(wrapped, _WRAPPED, True)
    setattr(owner, name, wrapped)


def _checked(create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The server's own process: before anything is loaded."""
    config = create(*args, **kwargs)
    if (settings := _asked_for(config)) is not None:
        import vllm

        from kvmix_vllm.settings import check

        check(config, settings, vllm.__version__)
    return config


def _with_managers(get_specs: Callable[..., Any], executor: Any) -> Any:
    """The engine's process: before it hands out pages."""
    if _is_asked_for(executor.vllm_config):
        from kvmix_vllm.managers import register_managers

        register_managers(executor.vllm_config)
    return get_specs(executor)


def _with_layers(init_device: Callable[..., Any], worker: Any) -> Any:
    """A worker's process: before the model is made."""
    if _is_asked_for(worker.vllm_config):
        from vllm.model_executor.layers.attention import Attention

        _wrap(Attention, "__init__", _served)
    return init_device(worker)


def _served(init: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
    """A layer is made."""
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    if (settings := _asked_for(config)) is None:
        return init(layer, *args, **kwargs)
    from kvmix_vllm.backend import PagedBackend
    from kvmix_vllm.layers import serve

    kwargs["attn_backend"] = kwargs.get("attn_backend") or PagedBackend
    init(layer, *args, **kwargs)
    return serve(layer, config, settings)


def _reported(initialize: Callable[..., Any], worker: Any, allotted: Any) -> Any:
    """A worker's process: before pages are made."""
    config = worker.vllm_config
    if (settings := _asked_for(config)) is not None:
        from kvmix_vllm.report import check_groups, report

        own = allotted[worker.global_rank]
        check_groups(config, own)
        if worker.global_rank == 0:
            report(config, settings, own)
    return initialize(worker, allotted)


def _asked_for(config: Any) -> Settings | None:
    """What is asked for. Of this project nothing is imported where that is nothing."""
    if not _is_asked_for(config):
        return None
    from kvmix_vllm.settings import asked_for

    return asked_for(config)


def _is_asked_for(config: Any) -> bool:
    return isinstance(config.additional_config, dict) and "kvmix" in config.additional_config
