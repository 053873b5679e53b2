"""torch.compile(model, backend="kvmix"): what Dynamo compiles, when, and what is said of what it does not."""

import copy
import pickle
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from transformers import CompileConfig, PreTrainedModel, StaticCache

import kvmix_compile
from kvmix_compile import Plan
from kvmix_compile.backend import kvmix, packed_cache
from kvmix_compile.backend import plan as backend_plan
from kvmix_compile.backend.calls import called_to_be_packed
from kvmix_compile.backend.equality import same
from kvmix_compile.errors import CacheError, CaptureError, UnsupportedModelError
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.signature import cache_in
from tests.helpers.cache_argument import with_cache

SLOTS = 128
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


pytestmark = pytest.mark.usefixtures("dynamo_begins_anew")


def ids(tokens: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def small(**settings: Any) -> PreTrainedModel:
    return tiny("llama", num_hidden_layers=1, **settings)


@cache
def plan() -> Plan:
    """At 16 bits, so that a model that is compiled with it answers as the original."""
    return kvmix_compile.analyze(small(), calibration=ids(96)).allocate(budget=16)


graphs: list[int] = []


def counting(module: torch.fx.GraphModule, inputs: Any) -> Any:
    """An inner backend that counts what it compiles. A function, of which a copy of the options has no copy."""
    graphs.append(len(graphs))
    return lookup_backend("eager")(module, inputs)


def compiled_since(before: int) -> int:
    return len(graphs) - before


def config(**options: Any) -> CompileConfig:
    """As on GPUs: the model prompts as it is, and steps are compiled."""
    chosen = CompileConfig(backend="kvmix", mode=None, options={"backend": counting, **options})
    chosen._compile_all_devices = True
    return chosen


def static_cache(model: PreTrainedModel) -> StaticCache:
    return StaticCache(model.config, max_cache_len=SLOTS)


def generated(model: PreTrainedModel, text: Tensor, **options: Any) -> Any:
    mask = torch.ones_like(text)
    settings = {**GREEDY, "cache_implementation": "static", "return_dict_in_generate": True, **options}
    return model.generate(text, attention_mask=mask, **settings)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-3 * expected.std())


# How often it compiles


def test_a_generation_compiles_its_steps_once_and_the_next_nothing() -> None:
    model, chosen = small(), config(plan=plan())
    expected = generated(small(), ids(20)).sequences
    for new in (1, 0):
        before = len(graphs)
        answer = generated(model, ids(20), compile_config=chosen)
        assert compiled_since(before) == new
        assert torch.equal(answer.sequences, expected)
        assert packed_cache(cache_in(answer)) is not None
    # A second number of rows makes their number a symbol, and then any number will do.
    for rows, new in ((3, 1), (4, 0), (5, 0)):
        before = len(graphs)
        generated(model, ids(20, rows), compile_config=chosen)
        assert compiled_since(before) == new, rows


def test_a_compiled_model_compiles_a_prompt_and_a_step() -> None:
    model = small()
    model.compile(backend="kvmix", options={"plan": plan(), "backend": counting})
    for new in (2, 0):
        before = len(graphs)
        generated(model, ids(20))
        assert compiled_since(before) == new


def test_chunks_of_a_prompt_are_compiled_once() -> None:
    """transformers makes the buffers before the first chunk, and calls the model otherwise for it than for the next."""
    model = small()
    model.compile(backend="kvmix", options={"plan": plan(), "backend": counting})
    expected = generated(small(), ids(32)).sequences
    for new in (3, 0):
        before = len(graphs)
        assert torch.equal(generated(model, ids(32), prefill_chunk_size=16).sequences, expected)
        assert compiled_since(before) == new


def test_buffers_that_are_reordered_before_the_first_step_are_packed_as_they_are_then() -> None:
    """Beam search does so, and buffers become other tensors by it."""
    model = small()
    past, rows = static_cache(model), torch.tensor([1, 0, 1])
    model(ids(20), **with_cache(past))
    past.reorder_cache(rows)
    step = torch.compile(model, backend="kvmix", options={"plan": plan(), "backend": counting})
    found = step(ids(1, 3), **with_cache(past)).logits
    assert close(found, small()(torch.cat([ids(20)[rows], ids(1, 3)], 1), use_cache=False).logits[:, -1:])


def test_a_cache_that_was_not_packed_can_be_copied_and_saved() -> None:
    model = small()
    step = torch.compile(model, backend="kvmix", options={"plan": plan(), "backend": counting})
    past = static_cache(model)
    model(ids(20), **with_cache(past))
    copies = [copy.deepcopy(past), copy.deepcopy(copy.deepcopy(past)), pickle.loads(pickle.dumps(past))]
    expected = small()(torch.cat([ids(20), ids(1)], 1), use_cache=False).logits[:, -1:]
    counts = []
    for one in (*copies, past):
        before = len(graphs)
        assert close(step(ids(1), **with_cache(one)).logits, expected)
        assert packed_cache(one) is not None
        counts.append(compiled_since(before))
    assert counts == [1, 0, 1, 0]


def test_other_models_see_a_cache_as_it_is() -> None:
    """What stands in for the buffers is for this backend's graphs alone."""
    past = static_cache(small())
    small()(ids(20), **with_cache(past))
    before = past.layers[0].keys
    found = torch.compile(small(), backend="eager")(ids(1), **with_cache(past)).logits
    assert past.layers[0].keys is before and not before.isnan().any()
    assert close(found, small()(torch.cat([ids(20), ids(1)], 1), use_cache=False).logits[:, -1:])


def test_buffers_that_were_replaced_by_others_are_refused() -> None:
    model = small()
    past = static_cache(model)
    model(ids(20), **with_cache(past))
    for layer in past.layers:
        layer.keys = layer.keys[:1]
    step = torch.compile(model, backend="kvmix", options={"plan": plan(), "backend": "eager"})
    with pytest.raises(CacheError, match="replaced from outside"):
        step(ids(1), **with_cache(past))


# Options with tensors


def test_tensors_are_compared_as_lists_are() -> None:
    one, other = ids(40), ids(40, seed=1)
    assert same({"calibration": one}, {"calibration": one.clone()})
    assert same([one, "text"], [one.clone(), "text"])
    assert same(one.numpy(), one.clone().numpy())
    for unequal in (other, one[:, :20], one.int(), one.tolist(), None, "text"):
        assert not same(one, unequal)
        assert not same(unequal, one)
    changed = one.clone()
    assert same(one, changed)
    changed[0, 0] += 1
    assert not same(one, changed)
    first, second, third = (CompileConfig(backend="kvmix", options={"calibration": it}) for it in (one, one + 0, other))
    assert first == second and first != third
    assert CompileConfig() != first and CompileConfig() == CompileConfig()


def test_models_measured_on_tensors_are_compiled_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each for itself: what was planned for one is not for another, though Dynamo's guards hold for it."""
    measured = []

    def analyze(model: Any, **options: Any) -> Any:
        measured.append(model)
        return kvmix_compile.analyze(model, **options)

    monkeypatch.setattr(backend_plan, "analyze", analyze)
    models = [small(), small(), small()]
    for model in models:
        # Again with what is equal and not the same, as from a configuration that was copied.
        for _ in range(2):
            answer = generated(model, ids(20), compile_config=config(calibration=ids(96), budget=16))
            assert torch.equal(answer.sequences, generated(small(), ids(20)).sequences)
    assert measured == models


# What is not compiled, and what is not compressed


WAYS = ["steps alone", "prompts too"]


@pytest.mark.parametrize("way", WAYS)
def test_where_dynamo_gives_up_nothing_stays_at_16_bits_in_silence(way: str) -> None:
    model, options = small(), {"plan": plan(), "backend": "eager"}
    if way == "prompts too":
        model.compile(backend="kvmix", options=options)
    chosen = {"compile_config": config(**options)} if way == "steps alone" else {}
    limit = torch._dynamo.config.patch(recompile_limit=2 if way == "prompts too" else 1)
    with limit, pytest.raises(CacheError, match=r"LlamaForCausalLM .* without compiling it.*recompile_limit"):
        for rows in (1, 2):
            generated(model, ids(20, rows), **chosen)
    # The model itself, and models of other backends, are not concerned.
    other = small()
    other.compile(backend="eager")
    for rows in (1, 2, 3):
        generated(other, ids(20, rows))


def test_a_model_that_is_asked_not_to_be_compiled_is_not() -> None:
    model = small()
    step = torch.compile(model, backend="kvmix", options={"plan": plan(), "backend": "eager"})
    with torch.compiler.set_stance("force_eager"):
        found = step(ids(20), **with_cache(static_cache(model))).logits
    assert close(found, small()(ids(20), use_cache=False).logits)


def test_the_backend_knows_its_own_calls() -> None:
    class Asks(nn.Module):
        @torch.compiler.disable
        def ask(self) -> str | None:
            call = called_to_be_packed()
            return None if call is None else call.name

        def forward(self, value: Tensor) -> tuple[Tensor, str | None]:
            return value + 1, self.ask()

    for backend, name in ((kvmix, "Asks"), ("kvmix", "Asks"), ("eager", None)):
        options = None if backend == "eager" else {"backend": "eager"}
        assert torch.compile(Asks(), backend=backend, options=options)(torch.ones(2))[1] == name
    assert called_to_be_packed() is None


class Attends(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(value, value, value)


def test_of_each_model_that_attends_without_a_cache_it_is_said_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in (nn.Linear(4, 4), Attends(), Attends()):
            step = torch.compile(model, backend="kvmix", options={"backend": "eager"})
            for tokens in (3, 5, 6):
                step(torch.ones(1, 1, tokens, 4))
            torch._dynamo.reset()
    assert [str(warning.message).partition(" that ")[0] for warning in caught if "kvmix" in str(warning.message)] == [
        "backend 'kvmix' was given a graph of Attends"
    ] * 2


def test_a_part_of_a_model_that_uses_a_packed_cache_without_attending_to_it_is_refused() -> None:
    model = small()
    past = static_cache(model)
    step = torch.compile(model, backend="kvmix", options={"plan": plan(), "backend": "eager"})
    step(ids(20), **with_cache(past))

    def peek(layer: Any) -> Tensor:
        return layer.keys[:, :, 0] * 2

    with pytest.raises(UnsupportedModelError, match="without the attention to them"):
        torch.compile(peek, backend="kvmix", options={"plan": plan(), "backend": "eager"})(past.layers[0])


# Rotary frequencies that change with the text: the model's forward has several paths


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("options", ["plan", "budget"])
def test_a_model_whose_frequencies_change_is_compressed_with_a_plan_and_with_a_budget(options: str) -> None:
    """It is measured as it is for short texts, where Dynamo compiles whatever path a text takes."""
    model = small(rope_parameters=DYNAMIC, max_position_embeddings=64)
    measured = {"calibration": ids(60, 4), "recent": 32}
    chosen: dict[str, Any] = {"budget": 2.3, **measured}
    if options == "plan":
        chosen = {"plan": kvmix_compile.analyze(model, **measured).allocate(budget=2.3)}
    step = torch.compile(model, backend="kvmix", options={**chosen, "backend": "eager"})
    past, text = static_cache(model), ids(72)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = [step(part, **with_cache(past)).logits for part in text.split([60, *[1] * 12], 1)]
    exact, plain = static_cache(model), small(rope_parameters=DYNAMIC, max_position_embeddings=64)
    expected = [plain(part, **with_cache(exact)).logits for part in text.split([60, *[1] * 12], 1)]
    assert close(found[0], expected[0])
    assert (found[-1] - expected[-1]).square().mean() < 0.3 * expected[-1].var()
    held = packed_cache(past)
    assert held is not None and held.plan.code_bits < 2.4
    with pytest.raises(CaptureError, match="could not capture"):
        kvmix_compile.apply(model, plan=replace(held.plan))
