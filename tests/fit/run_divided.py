"""Run by torchrun: transformers divides a model among the processes, which reads a text. The first process prints the
bytes of its weights, and of its cache.

Arguments: the folder of the model, rows and tokens of the text.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DynamicCache

from tests.helpers.cache_argument import with_cache
from tests.helpers.toy_llama import ids


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def main(folder: str, rows: int, tokens: int) -> None:
    """As the file says."""
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(rows, tokens), **with_cache(cache))
    weights = sum(local(weight).nbytes for weight in model.parameters())
    held = sum(local(tensor).nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    if dist.get_rank() == 0:
        print(weights, held)
    dist.destroy_process_group()


main(sys.argv[1], *map(int, sys.argv[2:]))
