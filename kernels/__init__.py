"""How keys and values are stored, written and attended to: no word of graphs or models."""

from kvmix_compile.kernels import ops as ops  # registers torch.ops.kvmix
from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.packing import dequantize_block, quantize_block
from kvmix_compile.kernels.precision import BLOCK_TOKENS, Axis, Precision
from kvmix_compile.kernels.reference import append, attend
from kvmix_compile.kernels.state import SiteState, StateLayout, packed_blocks, required_blocks

__all__ = [
    "BLOCK_TOKENS",
    "Axis",
    "KVMixError",
    "Precision",
    "SiteState",
    "StateLayout",
    "append",
    "attend",
    "dequantize_block",
    "packed_blocks",
    "quantize_block",
    "required_blocks",
]
