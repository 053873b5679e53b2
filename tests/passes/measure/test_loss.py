"""The loss of a row and its gradient: PyTorch's own, without tensors of float32 as large as the logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kvmix_compile.passes.measure.loss import TOKENS_AT_ONCE, summed_cross_entropy

TOKENS, VOCABULARY = 2 * TOKENS_AT_ONCE + 3, 50


class LargestMade(TorchDispatchMode):
    """Elements of the largest tensor of float32 that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.elements = max(self.elements, made.numel())
        return made


def logits_and_targets(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (3 * torch.randn(TOKENS, VOCABULARY)).to(dtype).requires_grad_(), torch.randint(VOCABULARY, (TOKENS,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_it_is_the_summed_cross_entropy_and_its_gradient(dtype: torch.dtype, tolerance: float) -> None:
    logits, targets = logits_and_targets(dtype)
    loss, expected = (
        summed_cross_entropy(logits, targets),
        F.cross_entropy(logits.float(), targets, reduction="sum"),
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    (gradient,), (of_expected,) = (torch.autograd.grad(total / 2, logits) for total in (loss, expected))
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, of_expected, rtol=tolerance, atol=tolerance)


def test_no_float32_as_large_as_the_logits_is_made() -> None:
    logits, targets = logits_and_targets(torch.bfloat16)
    with LargestMade() as made:
        torch.autograd.grad(summed_cross_entropy(logits, targets), logits)
    assert made.elements == TOKENS_AT_ONCE * VOCABULARY


def test_it_is_differentiated_once() -> None:
    """Its gradient is made once and given away: a second time it would be another."""
    logits, targets = logits_and_targets(torch.float32)
    loss = summed_cross_entropy(logits, targets)
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)
