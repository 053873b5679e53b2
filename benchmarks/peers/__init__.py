"""Attention of one decoded token by others, which benchmarks.attention compares attend with: a file for each library.

A peer takes queries `[rows, query heads, 1, head_dim]`, and keys and values `[rows, heads, tokens, head_dim]`, all of
them contiguous, and gives what it has by name. One whose package is not installed raises ImportError.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor

from benchmarks.errors import one_line
from benchmarks.peers.contender import Contender, Contenders
from benchmarks.peers.flash_attention import flash_attn, flash_attn_3
from benchmarks.peers.flash_infer import flashinfer
from benchmarks.peers.onnx_runtime import group_query_attention
from benchmarks.peers.pytorch import flex_attention, sdpa
from benchmarks.peers.quantized_cache import quanto

__all__ = ["PEERS", "Contender", "Contenders", "contenders", "installed_packages"]

# What they come from, as pip calls it, beside PyTorch and transformers.
PACKAGES = ("onnxruntime", "optimum-quanto", "flash-attn", "flash-attn-3", "flashinfer-python")

# The strongest that there are for a device, by the names under which they are left out.
PEERS: dict[str, dict[str, Callable[[Tensor, Tensor, Tensor], Contenders]]] = {
    "cpu": {"SDPA": sdpa, "onnxruntime": group_query_attention, "quanto": quanto},
    "cuda": {
        "SDPA": sdpa,
        "FlexAttention": flex_attention,
        "flash-attn": flash_attn,
        "flash-attn-3": flash_attn_3,
        "flashinfer": flashinfer,
    },
}


def contenders(q: Tensor, k: Tensor, v: Tensor) -> tuple[Contenders, dict[str, str]]:
    """All that can be had for the tensors' device, and why the others cannot, by name."""
    found: Contenders = {}
    left_out: dict[str, str] = {}
    for name, peer in PEERS[q.device.type].items():
        try:
            found |= peer(q, k, v)
        except Exception as error:  # not installed, or of another kind of its own
            left_out[name] = one_line(error)
    return found, left_out


def installed_packages() -> list[str]:
    """Those of PACKAGES whose versions matter to a result."""

    def is_installed(package: str) -> bool:
        try:
            return bool(version(package))
        except PackageNotFoundError:
            return False

    return [package for package in PACKAGES if is_installed(package)]
