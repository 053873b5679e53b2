"""Buffers: what is assembled piece by piece becomes a concatenation, where it is all of the buffer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from kvmix_compile.passes.graph.buffers import assemble_at_once
from kvmix_compile.passes.graph.vocabulary import operation

FIRST, SECOND = torch.randn(2, 3, 4), torch.randn(2, 3, 2)


def traced(run: Callable[[Tensor, Tensor], Tensor]) -> fx.GraphModule:
    module = make_fx(run, tracing_mode="fake")(FIRST, SECOND)
    assemble_at_once(module.graph)
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(FIRST, SECOND), run(FIRST, SECOND))
    return module


def operations(module: fx.GraphModule) -> list[str]:
    return [operation(node) for node in module.graph.nodes if node.op == "call_function"]


def test_a_buffer_becomes_a_concatenation() -> None:
    def run(first: Tensor, second: Tensor) -> Tensor:
        assembled = first.new_empty(2, 3, 6)
        assembled[..., 2:].copy_(first)
        assembled[..., :2].copy_(second)
        return assembled.sin()

    assert operations(traced(run)) == ["cat", "sin"]


def test_along_any_axis() -> None:
    def run(first: Tensor, second: Tensor) -> Tensor:
        assembled = torch.empty(4, 3, 4)
        assembled[:2] = first
        assembled[2:4] = first + 1
        return assembled.sum()

    assert operations(traced(run)) == ["add", "cat", "sum"]


def not_filled(first: Tensor, second: Tensor) -> Tensor:
    assembled = first.new_empty(2, 3, 8)
    assembled[..., :4].copy_(first)
    assembled[..., 4:6].copy_(second)
    return assembled[..., :6]


def written_twice(first: Tensor, second: Tensor) -> Tensor:
    assembled = first.new_empty(2, 3, 4)
    assembled[..., :4].copy_(first)
    assembled[..., :2].copy_(second)
    return assembled + 1


def read_between(first: Tensor, second: Tensor) -> Tensor:
    assembled = first.new_empty(2, 3, 6)
    assembled[..., :4].copy_(first)
    before = assembled[..., :4] * 2
    assembled[..., 4:].copy_(second)
    return assembled + before.sum()


def converted(first: Tensor, second: Tensor) -> Tensor:
    assembled = first.new_empty(2, 3, 6, dtype=torch.float64)
    assembled[..., :4].copy_(first)
    assembled[..., 4:].copy_(second)
    return assembled + 1


def repeated(first: Tensor, second: Tensor) -> Tensor:
    assembled = first.new_empty(2, 3, 6)
    assembled[..., :4].copy_(first[:, :1])
    assembled[..., 4:].copy_(second)
    return assembled + 1


@pytest.mark.parametrize("run", [not_filled, written_twice, read_between, converted, repeated])
def test_any_other_is_left_as_it_is(run: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert "cat" not in operations(traced(run))
