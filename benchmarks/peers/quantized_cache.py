"""transformers' QuantizedCache with quanto, 4 bits: it dequantizes all that it holds for each token."""

import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, QuantizedCache

from benchmarks.peers.contender import Contender, Contenders
from kvmix_compile.evaluate.baselines import QUANTIZED_GROUP, QUANTIZED_RECENT

BITS = 4


def quanto(q: Tensor, k: Tensor, v: Tensor) -> Contenders:
    """A step of a layer: a token is stored, all are dequantized and attended to. Raises ImportError without quanto.

    A step adds a token, of which QUANTIZED_RECENT wait unquantized.
    """
    step = _Step(q, k, v)
    return {f"quanto-{BITS}": Contender(step.run, lambda: step.held, bits=BITS)}


class _Step:
    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        heads, head_dim = q.shape[1], q.shape[3]
        config = LlamaConfig(
            hidden_size=heads * head_dim, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=k.shape[1]
        )
        self.cache = QuantizedCache(
            "quanto", config, nbits=BITS, q_group_size=QUANTIZED_GROUP, residual_length=QUANTIZED_RECENT
        )
        self.q, self.next_token = q, (k[:, :, -1:], v[:, :, -1:])
        self.cache.update(k[:, :, :-1], v[:, :, :-1], 0)
        self.held = (k, v)

    def run(self) -> Tensor:
        self.held = self.cache.update(*self.next_token, 0)
        return F.scaled_dot_product_attention(self.q, *self.held, enable_gqa=True)
