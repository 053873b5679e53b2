"""What transformers' models offer and a compiled one cannot do: each is refused by name."""

from collections.abc import Callable
from typing import Any, NoReturn

from kvmix_compile.errors import InputError

_BATCHING = "as continuous batching keeps its own paged cache: pass a batch, padded on the left, to generate()"
_TRAINING = "which is not trained: train the original, and call kvmix_compile.apply on it again"

# By method: why not, and what to do instead.
UNAVAILABLE = {
    "generate_batch": _BATCHING,
    "init_continuous_batching": _BATCHING,
    "continuous_batching_context_manager": _BATCHING,
    "resize_token_embeddings": "which has the vocabulary that it was compiled with: resize the original model's, "
    "and call kvmix_compile.apply on it again",
    "gradient_checkpointing_enable": _TRAINING,
    "enable_input_require_grads": _TRAINING,
}


def refusals(original: type) -> dict[str, Callable[..., NoReturn]]:
    """Methods that raise InputError, for those of `original` that a compiled model does not have."""
    return {name: _refusing(name, reason) for name, reason in UNAVAILABLE.items() if hasattr(original, name)}


def _refusing(name: str, reason: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise InputError(f"{name} is not available from a compiled model, {reason}")

    refuse.__name__ = name
    return refuse
