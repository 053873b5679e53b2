"""Regions: parts of a forward with autocast or gradients turned on or off, and what may not be in a forward."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import HigherOrderOperator

import kvmix_compile
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.export import capture
from kvmix_compile.passes.errors import CaptureError
from kvmix_compile.passes.graph.vocabulary import operation
from tests.helpers.one_capture import applied, captured_once

WIDTH, HEADS, VOCABULARY = 64, 2, 96
Part = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """Embedding, what is tried, attention, and logits."""

    def __init__(self, part: Part, around: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.part, self.around = part, around
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.around is None:
            return self.answered(input_ids)
        with self.around():
            return self.answered(input_ids)

    def answered(self, input_ids: Tensor) -> Tensor:
        hidden = self.part(self, self.embedding(input_ids))
        batch, tokens, _ = hidden.shape
        query, key, value = (
            part.view(batch, tokens, HEADS, -1).transpose(1, 2) for part in self.qkv(hidden).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(hidden + attended.transpose(1, 2).flatten(2))


def autocast(**options: object) -> torch.autocast:
    return torch.autocast("cpu", **options)


def disabled(model: Model, hidden: Tensor) -> Tensor:
    with autocast(enabled=False):
        return hidden + torch.arange(hidden.shape[1])[:, None].float().sin()


def enabled(model: Model, hidden: Tensor) -> Tensor:
    with autocast(dtype=torch.bfloat16):
        inner = model.inner(hidden)
        scaled = F.gelu(inner) * hidden  # bfloat16 and float32: promoted
    return scaled + inner


def enabled_with_part_disabled(model: Model, hidden: Tensor) -> Tensor:
    with autocast(dtype=torch.bfloat16):
        inner = model.inner(hidden)
        with autocast(enabled=False):
            exact = model.inner(inner.float())
        return model.inner(exact) + exact


def several_results(model: Model, hidden: Tensor) -> Tensor:
    with autocast(enabled=False):
        first, second = model.inner(hidden).chunk(2, -1)
    return torch.cat([second, first], -1) + hidden


def gradients(model: Model, hidden: Tensor) -> Tensor:
    with torch.enable_grad():
        inner = model.inner(hidden)
    with torch.no_grad():
        inner = inner.relu()
    torch.set_grad_enabled(True)
    inner = model.norm(inner)
    torch.set_grad_enabled(False)
    return inner + hidden


def inference(model: Model, hidden: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.inner(hidden)


def nested(model: Model, hidden: Tensor) -> Tensor:
    with torch.enable_grad(), autocast(enabled=False):
        return gradients(model, disabled(model, hidden))


PARTS = {part.__name__: part for part in (
    disabled, enabled, enabled_with_part_disabled, several_results, gradients, inference, nested
)}  # fmt: skip
WHOLE = {
    "autocast off": lambda: autocast(enabled=False),
    "autocast to bfloat16": lambda: autocast(dtype=torch.bfloat16),
    "autocast of another device": lambda: torch.autocast("cuda", dtype=torch.bfloat16, enabled=False),
    "gradients": torch.enable_grad,
}


def text(tokens: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(5))


def check(model: nn.Module, tolerance: float) -> None:
    """A twin at 16 bits answers as the model, in chunks, and the graph holds no region any more."""
    model.eval()
    assert not [node for node in captured_once(model).graph.nodes if isinstance(node.target, HigherOrderOperator)]
    twin = applied(model, budget=16, calibration=text(64), sinks=4, recent=32)
    ids, past = text(90), kvmix_compile.KVMixCache(twin)
    with torch.no_grad():
        expected = kvmix_compile.passes.capture.export.logits_of(model(ids))
    found = torch.cat([twin(part, past_key_values=past).logits for part in ids.split([50, 1, 39], 1)], 1)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_with_another_mode_computes_what_the_model_does(part: str) -> None:
    check(Model(PARTS[part]), 1e-2 if "enabled" in part else 1e-5)


@pytest.mark.parametrize("mode", WHOLE)
def test_so_does_a_forward_that_turns_a_mode_on_for_all_of_itself(mode: str) -> None:
    check(Model(disabled, WHOLE[mode]), 2e-2 if "bfloat16" in mode else 1e-5)


def test_autocast_of_a_part_is_written_down_where_it_converts() -> None:
    graph = capture(Model(enabled).eval()).graph
    (inner, *_) = (node for node in graph.nodes if operation(node) == "linear")
    assert all(operation(source) == "to" for source in inner.all_input_nodes)
    assert {source.meta["val"].dtype for source in inner.all_input_nodes} == {torch.bfloat16}


@pytest.mark.parametrize("mixed", [False, True])
def test_a_forward_wrapped_by_accelerate_is_compiled(mixed: bool) -> None:
    from accelerate.utils.operations import convert_outputs_to_fp32

    model = tiny("llama")
    forward = model.forward
    if mixed:
        forward = autocast(dtype=torch.bfloat16)(forward)
    model.forward = convert_outputs_to_fp32(forward)
    ids = text(90)
    twin = kvmix_compile.apply(model, budget=16, calibration=text(64))
    with torch.no_grad():
        expected = model(ids).logits
    found = twin(ids).logits
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.2 if mixed else 1e-4, rtol=0)


def test_a_forward_that_draws_random_numbers_is_refused_by_name() -> None:
    def noisy(model: Model, hidden: Tensor) -> Tensor:
        return hidden + torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))

    with pytest.raises(CaptureError, match=r"draws random numbers \(randn\)"):
        capture(Model(noisy).eval())
    with pytest.raises(CaptureError, match=r"draws random numbers \(uniform_\)"):
        capture(Model(lambda _, hidden: hidden + torch.empty_like(hidden).uniform_()).eval())


def test_random_numbers_that_are_drawn_and_not_used_change_nothing() -> None:
    def idle(model: Model, hidden: Tensor) -> Tensor:
        torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
        return hidden

    check(Model(idle), 1e-5)


def test_an_operator_that_calls_parts_of_the_model_is_refused_by_name() -> None:
    def branching(model: Model, hidden: Tensor) -> Tensor:
        return torch.cond(hidden.sum() > 0, torch.sin, torch.cos, (hidden,))

    with pytest.raises(CaptureError, match="contains cond"):
        capture(Model(branching).eval())
