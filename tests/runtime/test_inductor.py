"""apply(.., compile=True): what Inductor makes of the rewritten graph is that graph, at any size, compiled twice."""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.compiler import config as compiler_config
from transformers import LlamaForCausalLM, PreTrainedModel

import kvmix_compile
from kvmix_compile import KVMixCache, KVMixError
from kvmix_compile.errors import CompilationError
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.runtime.inductor import InductorGraph
from tests.helpers.one_capture import applied
from tests.helpers.toy_llama import RECENT, SINKS, ids


@cache
def original() -> PreTrainedModel:
    return tiny("llama", num_hidden_layers=1)


@cache
def eager() -> PreTrainedModel:
    """At 8 bits, of which one that rounding turns hardly tells."""
    return applied(original(), budget=8, calibration=ids(2, 128), sinks=SINKS, recent=RECENT)


@cache
def compiled() -> PreTrainedModel:
    return applied(original(), plan=eager().kvmix_plan, verify=False, compile=True)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is compiled while a test runs; in the place of Inductor, the graph itself."""
    seen: list[Any] = []

    def compile(module: Any, inputs: list[Tensor], options: Any = None) -> Any:
        seen.append(inputs)
        return module

    monkeypatch.setattr(torch._inductor, "compile", compile)
    yield seen


def read(model: Any, text: Tensor, chunks: list[int], rollback: int = 0) -> tuple[Tensor, KVMixCache]:
    past = KVMixCache(model, rollback)
    logits = [model(part, past_key_values=past).logits for part in text.split(chunks, dim=1)]
    return torch.cat(logits, dim=1), past


def assert_same(found: Tensor, expected: Tensor) -> None:
    """But for rounding, which may turn a code, or the last digit of a float16: how often depends on the processor, and
    few logits move by more than a few roundings.
    """
    torch.testing.assert_close(found, expected, atol=0.05, rtol=1e-4)
    assert (found - expected).abs().median() < 1e-5


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rollback", [0, 8])
def test_logits_and_state_are_those_of_the_graph_itself(rows: int, rollback: int) -> None:
    """From no block to many, in chunks and steps. What is read in steps is written in place, and read again."""
    text, chunks = ids(rows, 150), [30, *[1] * 70, 30, *[1] * 20]
    (expected, past), (found, own) = (read(model, text, chunks, rollback) for model in (eager(), compiled()))
    assert_same(found, expected)
    for one, other in zip(own.tensors(), past.tensors(), strict=True):
        # Inductor's sums are rounded otherwise, and may turn a code, or the last digit of a float16.
        torch.testing.assert_close(one, other, atol=1 if one.dtype == torch.uint8 else 1e-4, rtol=1e-3)
    assert isinstance(compiled().kvmix_program.inductor, InductorGraph)
    assert "compile" in compiled().kvmix_report.seconds


def test_exact_chunks_too() -> None:
    exact = applied(original(), plan=eager().kvmix_plan, exact_chunks=True, verify=False)
    own = applied(original(), plan=exact.kvmix_plan, verify=False, compile=True)
    text = ids(2, 150)
    expected, _ = read(exact, text, [1] * 150)
    found, _ = read(own, text, [90, *[1] * 20, 40])
    assert_same(found, expected)


def test_logits_to_keep() -> None:
    text = ids(2, 30)
    for kept in (1, 7, torch.tensor([3, 29])):
        found, expected = (model(text, logits_to_keep=kept).logits for model in (compiled(), eager()))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_padded_batch_generates_the_same() -> None:
    prompt, mask = ids(2, 60), torch.ones(2, 60, dtype=torch.int64)
    prompt[1, :25], mask[1, :25] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    for beams in (1, 3):
        found, expected = (model.generate(prompt, num_beams=beams, **options) for model in (compiled(), eager()))
        assert torch.equal(found, expected)


def test_2000_tokens_compile_two_graphs(graphs: list[Any]) -> None:
    longer = tiny("llama", num_hidden_layers=1, max_position_embeddings=2048)
    model = kvmix_compile.apply(longer, plan=eager().kvmix_plan, verify=False, compile=True)
    assert len(graphs) == 2
    for rows, tokens in ((1, 2021), (2, 300)):
        past, rooms = KVMixCache(model), set()
        for part in ids(rows, tokens).split([1, 20, *[1] * (tokens - 21)], dim=1):
            model(part, past_key_values=past)
            rooms.add(past.states[0].blocks)
        assert len(rooms) > 5 and {0, 1} < rooms
    assert len(graphs) == 2


def test_layers_with_a_window_have_a_room_of_their_own(graphs: list[Any]) -> None:
    original = tiny("gemma2", sliding_window=60)
    plain = applied(original, budget=2.3, calibration=ids(2, 128), sinks=SINKS, recent=RECENT)
    model = applied(original, plan=plain.kvmix_plan, verify=False, compile=True)
    with_window, without = (inputs[index].shape[2] for inputs in graphs[:1] for index in (5 + 2, 5 + 6 + 2))
    assert str(with_window) != str(without)
    text, chunks = ids(2, 150), [30, *[1] * 70, 30, *[1] * 20]
    (found, past), (expected, _) = (read(of, text, chunks) for of in (model, plain))
    assert torch.equal(found, expected)
    assert [state.blocks for state in past.states] == [2, 4] and len(graphs) == 2


def test_a_short_cache_of_a_model_that_is_not_compiled_is_taken() -> None:
    """It has fewer sinks than are compiled for, until its text is longer."""
    text, past, expected = ids(2, 60), KVMixCache(eager()), KVMixCache(eager())
    eager()(text[:, :2], past_key_values=past), eager()(text[:, :2], past_key_values=expected)
    assert past.states[0].room.sinks == 2
    for chunk in text[:, 2:].split([1, 1, 30, 1, 25], dim=1):
        logits = compiled()(chunk, past_key_values=past).logits
        torch.testing.assert_close(logits, eager()(chunk, past_key_values=expected).logits, atol=1e-4, rtol=1e-4)


def test_a_cache_of_a_compiled_model_begins_whole() -> None:
    past = KVMixCache(compiled())
    compiled()(ids(1, 2), past_key_values=past)
    assert past.nbytes == compiled().kvmix_plan.cache_bytes(2, 1, torch.float32, begins_whole=True)
    assert past.states[0].room == past.layouts[0].whole(0)


def test_inductor_itself_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled()

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", refuse)
    text = ids(4, 200, seed=3)
    assert_same(*(read(model, text, [5, *[1] * 195])[0] for model in (compiled(), eager())))


def test_sizes_that_the_graph_does_not_hold_for_run_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mixture of experts, whose indices have 16 bits while there are few tokens."""

    def compile(module: Any, inputs: list[Any]) -> Any:
        ids = inputs[0]
        assumed = ids.shape[1] < 100
        assert assumed  # which the shape environment writes down

        def run(*given: Tensor) -> tuple[Tensor]:
            assert given[0].shape[1] < 100
            return module(*given)

        return run

    monkeypatch.setattr(torch._inductor, "compile", compile)
    model = applied(original(), plan=eager().kvmix_plan, verify=False, compile=True)
    for tokens in (99, 100):
        text = ids(2, tokens)
        torch.testing.assert_close(model(text).logits, eager()(text).logits)


def test_code_compiled_for_other_operators_or_another_processor_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own cache on disk outlives an upgrade of kvmix_compile, and may lie in a home of many machines."""
    tags: list[str] = []

    def compile(module: Any, inputs: list[Any]) -> Any:
        tags.append(compiler_config.cache_key_tag)
        return module

    def prepare() -> str:
        InductorGraph(program.rewritten.module, program.plan.layouts(), program.dtypes, program.device).prepare()
        prompt, step = tags[-2:]
        assert prompt == step
        return step

    monkeypatch.setattr(torch._inductor, "compile", compile)
    before, program = compiler_config.cache_key_tag, eager().kvmix_program
    as_they_are = prepare()
    with monkeypatch.context() as another:
        another.setattr(torch.ops.kvmix, "attend", torch.ops.kvmix.append)  # another operator under its name
        operators = prepare()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "that of another machine")
    processor = prepare()
    assert len({before, as_they_are, operators, processor}) == 4
    assert compiler_config.cache_key_tag == before


# A compiled model is a model


def test_a_deep_copy_is_compiled_with_its_own_weights(graphs: list[Any]) -> None:
    model = applied(original(), plan=eager().kvmix_plan, verify=False, compile=True)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert copied(ids(1, 9)).logits.abs().max() == 0 and len(graphs) == 3
    assert model(ids(1, 9)).logits.abs().max() > 0


def test_weights_may_change_in_place() -> None:
    own = copy.deepcopy(original())
    model = kvmix_compile.apply(own, plan=eager().kvmix_plan, verify=False, compile=True)
    with torch.no_grad():
        own.lm_head.weight.zero_()
    assert model(ids(1, 9)).logits.abs().max() == 0


def test_a_folder_says_that_it_is_compiled(tmp_path: Path, graphs: list[Any]) -> None:
    model = applied(original(), plan=eager().kvmix_plan, verify=False, compile=True)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert len(graphs) == 2 * 2 and loaded.kvmix_program.inductor is not None
    torch.testing.assert_close(loaded(ids(1, 9)).logits, model(ids(1, 9)).logits)


# What it needs


def test_without_a_compiler_it_says_what_to_do_first() -> None:
    message = r"needs a C\+\+ compiler.*install g\+\+.*or leave compile out"
    without = inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with without, pytest.raises(CompilationError, match=message):
        applied(original(), plan=eager().kvmix_plan, compile=True)


def test_what_inductor_cannot_compile_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no\nwhole\nstory")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    with pytest.raises(KVMixError, match=r"could not compile the model: no\. Call .* without compile=True"):
        applied(original(), plan=eager().kvmix_plan, verify=False, compile=True)
