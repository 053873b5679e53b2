"""Another library's attention of one decoded token, and whether it is attention."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest difference from exact attention over the same keys and values, root mean square over a head's channels, as a
# share of the results' standard deviation. Rounding makes a fifth of it; a head or a token in another's place makes 1.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Contender:
    """What is timed, and what it is held against.

    run: gives the values averaged, with the elements of `[rows, query heads, 1, head_dim]` in that order.
    held: keys and values as it holds them, `[rows, heads, tokens, head_dim]` each, dequantized.
    bits: of an element's code; None where elements are in the queries' dtype.
    own_threads: it runs on threads of its own, and not on PyTorch's.
    """

    run: Callable[[], Tensor]
    held: Callable[[], tuple[Tensor, Tensor]]
    bits: int | None = None
    own_threads: bool = False

    def fault(self, q: Tensor) -> str | None:
        """What is wrong with its result for these queries, `[rows, query heads, 1, head_dim]`; None for nothing."""
        actual = self.run().reshape(q.shape).float()
        keys, values = (elements.float() for elements in self.held())
        exact = F.scaled_dot_product_attention(q.float(), keys, values, enable_gqa=True)
        share = ((actual - exact).square().mean(-1).sqrt().max() / exact.std()).item()
        if share <= TOLERANCE[q.dtype]:
            return None
        return f"its result is not attention: it differs from it by {share:.2g} standard deviations"


# What is compared, by name.
Contenders = dict[str, Contender]
