"""Loss: what a text costs, and how that changes with the logits, in little more memory than the logits take.

With 128256 token ids, as Llama 3 has them, the logits of 512 tokens are 263 MB in float32, and autograd would keep or
make five tensors of that size on the way.
"""

from typing import Any

import torch
from torch import Tensor

# What is worked out at a time, so many tokens of logits in float32, is small beside all of them.
TOKENS_AT_ONCE = 64


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy in nats of `targets`, int64 `[tokens]`, summed in float32; of `logits` `[tokens, vocabulary]`,
    in which it can be differentiated, once.
    """
    loss: Tensor = _SummedCrossEntropy.apply(logits, targets)
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    """Makes the gradient together with the loss, in the dtype of the logits, which are then needed no more."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        gradient, loss = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float32)
        parts = (tensor.split(TOKENS_AT_ONCE) for tensor in (logits, targets, gradient))
        for part, wanted, slope in zip(*parts, strict=True):
            logarithms = part.float().log_softmax(-1)
            loss -= logarithms.gather(-1, wanted[:, None]).sum()
            slope.copy_(logarithms.exp_().scatter_add_(-1, wanted[:, None], -torch.ones_like(logarithms[:, :1])))
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(gradients[0]), None
