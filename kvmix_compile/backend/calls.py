"""Calls: whether Python is inside a call of something that was compiled with this backend.

Dynamo does not tell what it traces or runs which backend was asked for; the call of the compiled function does, further
up the stack.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo import eval_frame

NAME = "kvmix"
Backend = TypeVar("Backend", bound=Callable[..., Any])


def packs_caches(backend: Backend) -> Backend:
    """Marks the backend, so that what was compiled with it is told from the rest."""
    backend.packs_caches = True  # type: ignore[attr-defined]
    return backend


def is_ours(backend: object) -> bool:
    """Whether it is this backend, by name or as a function, with arguments of its own or not."""
    backend = getattr(backend, "compiler_fn", backend)
    return backend == NAME or getattr(getattr(backend, "func", backend), "packs_caches", False)


# What a compiled function is called through.
COMPILED_CALL = next(
    (
        constant
        for constant in eval_frame._TorchDynamoContext.__call__.__code__.co_consts
        if isinstance(constant, CodeType) and {"fn", "callback"} <= set(constant.co_freevars)
    ),
    None,
)


@dataclass(frozen=True)
class CompiledCall:
    """A call of what torch.compile gave. `called`: the module whose method was compiled, else the function."""

    called: object
    backend: object

    @property
    def name(self) -> str:
        return getattr(self.called, "__name__", type(self.called).__name__)


def compiled_call() -> CompiledCall | None:
    """The innermost call of something compiled that Python is in, whether Dynamo compiles, or runs it as it is.

    None outside of such calls, and where the user told Dynamo to compile nothing.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not COMPILED_CALL:
        frame = frame.f_back
    if frame is None or eval_frame._stance.stance == "force_eager":
        return None
    function, callback = frame.f_locals["fn"], frame.f_locals["callback"]
    owner = getattr(function, "__self__", None)
    called = owner if isinstance(owner, nn.Module) else getattr(function, "__func__", function)
    return CompiledCall(called, _innermost(callback))


def _innermost(callback: Any) -> object:
    """The backend behind what Dynamo wraps around it."""
    inner = getattr(callback, "_torchdynamo_orig_backend", None)
    return callback if inner is None else _innermost(inner)


def called_to_be_packed() -> CompiledCall | None:
    """The same, where it is a call of something compiled with this backend."""
    call = compiled_call()
    return call if call is not None and is_ours(call.backend) else None


@torch.compiler.assume_constant_result
def traced_to_be_packed() -> bool:
    """Whether Dynamo traces for this backend; a constant to Dynamo."""
    return called_to_be_packed() is not None
