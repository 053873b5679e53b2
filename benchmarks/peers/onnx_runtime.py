"""ONNX Runtime's attention of a decoded token on a CPU: keys and values in the queries' dtype, in 8 bits and in 4.

Its operator com.microsoft.GroupQueryAttention has all three there. Codes are symmetric about zero, with one scale for
each channel of a head and no zero points; scales are an input, settled before the first token, as ours are not. A
model of this one node is made in memory. Its inputs and outputs are bound to tensors, and past and present to the same
ones, whereupon the operator writes the new token into its place and copies nothing else: a step stores its token, which
with ours append does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.contender import Contender, Contenders

DOMAIN = "com.microsoft"
# Of the model: any that onnxruntime reads since its operator has quantized caches.
ONNX_VERSIONS = {"opset": 21, "ir_version": 10}
DTYPES = (torch.float32, torch.float16)
# Of a code; None where keys and values are not quantized. It refuses others.
BIT_WIDTHS = (None, 8, 4)
# Between the optional inputs: cos_cache, sin_cache, position_ids, attention_bias and head_sink are not given.
NOT_GIVEN = [""] * 5


def group_query_attention(q: Tensor, k: Tensor, v: Tensor) -> Contenders:
    """A contender for each of BIT_WIDTHS; raises ImportError where onnx or onnxruntime is not installed."""
    import onnx  # type: ignore[import-not-found]  # noqa: F401
    import onnxruntime  # type: ignore[import-not-found]  # noqa: F401

    if q.dtype not in DTYPES:
        raise ValueError(f"its kernels for CPUs take float32 and float16, and this is {q.dtype}")
    return {
        f"onnxruntime-{bits}" if bits else "onnxruntime": Contender(step.run, step.held, bits, own_threads=True)
        for bits in BIT_WIDTHS
        for step in [_Step(bits, q, k, v)]
    }


class _Step:
    """A decoded token, and all the memory that it is bound to."""

    def __init__(self, bits: int | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.bits = bits
        self.cache, self.scales = _stored(bits, k, v)
        rows, query_heads, tokens = len(q), q.shape[1], k.shape[2]
        self.inputs = {
            "query": q.reshape(rows, 1, -1),
            "key": k[:, :, -1].reshape(rows, 1, -1),
            "value": v[:, :, -1].reshape(rows, 1, -1),
            "past_key": self.cache[0],
            "past_value": self.cache[1],
            "seqlens_k": torch.full((rows,), tokens - 1, dtype=torch.int32),
            "total_sequence_length": torch.tensor([tokens], dtype=torch.int32),
            **dict(zip(("k_scale", "v_scale"), self.scales, strict=False)),
        }
        self.output = torch.empty_like(self.inputs["query"])
        outputs = {"output": self.output, "present_key": self.cache[0], "present_value": self.cache[1]}
        model = _model(bits, query_heads, k.shape[1], self.inputs, outputs)
        self.session, self.binding = _bound(model, self.inputs, outputs)

    def run(self) -> Tensor:
        self.session.run_with_iobinding(self.binding)
        return self.output

    def held(self) -> tuple[Tensor, Tensor]:
        if self.bits is None:
            keys, values = self.cache
        else:
            keys, values = (codes(x, self.bits) * scale for x, scale in zip(self.cache, self.scales, strict=True))
        return keys, values


def _stored(bits: int | None, *elements: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values as the operator stores them, and the scales that go with them."""
    if bits is None:
        return list(elements), []
    scales = [channel_scales(each, bits) for each in elements]
    return [quantized(each, scale, bits) for each, scale in zip(elements, scales, strict=True)], scales


def channel_scales(elements: Tensor, bits: int) -> Tensor:
    """float32 `[1, heads, 1, head_dim]`, so that the largest magnitude of a channel has the largest code."""
    return elements.float().abs().amax((0, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / (
        2 ** (bits - 1) - 1
    )


def quantized(elements: Tensor, scales: Tensor, bits: int) -> Tensor:
    """int8 `[.., head_dim]`; of 4 bits uint8 `[.., head_dim / 2]`, 8 more than each code, an even channel's low."""
    rounded = (elements.float() / scales).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if bits == 8:
        return rounded.to(torch.int8)
    low, high = ((rounded[..., first::2] + 8).to(torch.uint8) for first in (0, 1))
    return low | high << 4


def codes(cache: Tensor, bits: int) -> Tensor:
    """float32 `[.., head_dim]`: what `quantized` packed."""
    if bits == 8:
        return cache.float()
    return torch.stack([cache & 15, cache >> 4], -1).flatten(-2).float() - 8


def _model(
    bits: int | None, query_heads: int, heads: int, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> bytes:
    """One node, as a serialized model whose inputs and outputs have these names, dtypes and shapes."""
    from onnx import helper

    names = list(inputs)
    attributes: dict[str, Any] = {"num_heads": query_heads, "kv_num_heads": heads}
    if bits:
        names[7:7] = NOT_GIVEN
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": bits}
    node = helper.make_node("GroupQueryAttention", names, list(outputs), domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], "attention", _declared(inputs), _declared(outputs))
    opsets = [helper.make_opsetid("", ONNX_VERSIONS["opset"]), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ONNX_VERSIONS["ir_version"])
    return model.SerializeToString()


def _declared(tensors: dict[str, Tensor]) -> Sequence[Any]:
    from onnx import helper

    return [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(_numpy_dtype(tensor)), tensor.shape)
        for name, tensor in tensors.items()
    ]


def _bound(model: bytes, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> tuple[Any, Any]:
    """A session with as many threads as PyTorch has, which are idle between runs, and what it reads and writes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            bind(name, "cpu", 0, _numpy_dtype(tensor).type, list(tensor.shape), tensor.data_ptr())
    return session, binding


def _numpy_dtype(tensor: Tensor) -> np.dtype:
    return tensor.new_empty(0).numpy().dtype
