"""First run: what a model's forward adds to its modules when it first runs, made real.

Capturing it, the forward made that of fake tensors, which were put back. Where it is the same for every text (the
frequencies of long texts, say), the model may have it from now on, as after any forward; where it depends on the text,
or would be saved with the weights, it may not.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kvmix_compile.passes.untouched.untouched import untouched

# Two short texts, of different lengths.
LENGTHS = (3, 7)

Added = Iterable[tuple[nn.Module, str]]


def names_held(model: nn.Module) -> dict[nn.Module, set[str]]:
    """The names of each module's attributes and of its buffers that are not saved."""
    return {module: vars(module).keys() | _unsaved_buffers(module).keys() for module in model.modules()}


def added_since(before: dict[nn.Module, set[str]]) -> Added:
    """What the modules have now and had not then."""
    held = ((module, vars(module).keys() | _unsaved_buffers(module).keys()) for module in before)
    return [(module, name) for module, names in held for name in names - before[module]]


def make_real(model: nn.Module, added: Added, run: Callable[[int], object]) -> None:
    """Give the modules what two runs on short texts of different lengths both add. `run`: runs the model on as many
    tokens.
    """
    if not added:
        return
    try:
        first, second = (_found_after(model, added, run, length) for length in LENGTHS)
    except Exception:  # the model's own: it runs as little as before
        return
    for (module, name), one, other in zip(added, first, second, strict=True):
        if one is None or other is None or one[0].shape != other[0].shape or not torch.equal(one[0], other[0]):
            continue
        tensor, is_buffer = one
        if is_buffer:
            module.register_buffer(name, tensor, persistent=False)
        else:
            vars(module)[name] = tensor


def _found_after(
    model: nn.Module, added: Added, run: Callable[[int], object], length: int
) -> list[tuple[Tensor, bool] | None]:
    """Each of the tensors that a run added, and whether it is a buffer; None where it added none."""
    with untouched(model), torch.no_grad():
        run(length)
        found: list[tuple[Tensor, bool] | None] = []
        for module, name in added:
            buffers = _unsaved_buffers(module)
            value = buffers.get(name, vars(module).get(name))
            is_plain = type(value) is Tensor and not value.requires_grad
            found.append((value, name in buffers) if isinstance(value, Tensor) and is_plain else None)
    return found


def _unsaved_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: held for name, held in module._buffers.items() if name in module._non_persistent_buffers_set}
