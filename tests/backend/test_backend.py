"""torch.compile(model, backend="kvmix"): the originals' logits and texts, plans, options, and what is refused."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch.compiler import config as compiler_config
from transformers import CompileConfig, PreTrainedModel, StaticCache

import kvmix_compile
from kvmix_compile import KVMixCache, Plan
from kvmix_compile.backend import kvmix
from kvmix_compile.backend import plan as backend_plan_module
from kvmix_compile.backend.padding import SeenMask
from kvmix_compile.backend.plan import Options, choose_plan
from kvmix_compile.errors import CacheError, InputError, PlanError, UnsupportedModelError
from kvmix_compile.models_zoo.tiny import WINDOW, tiny
from kvmix_compile.passes.capture.signature import cache_in
from kvmix_compile.passes.match.sites import find_sites
from tests.helpers.cache_argument import with_cache
from tests.helpers.compiled import (
    RECENT,
    SLOTS,
    close,
    compiled,
    fresh,
    held,
    ids,
    logits,
    low,
    original,
    padded,
    plan_for,
    static_cache,
)
from tests.helpers.one_capture import analyzed, applied, captured_once

GREEDY = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


pytestmark = pytest.mark.usefixtures("dynamo_begins_anew")


class Counting:
    """An inner backend that counts what it compiles."""

    def __init__(self) -> None:
        self.graphs = 0
        self.cache_tag = ""

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        self.cache_tag = compiler_config.cache_key_tag
        return lookup_backend("eager")(module, inputs)


# The same as the original without quantization, and as `apply` with it


@pytest.mark.parametrize(("name", "dynamic"), [("gemma2", None), ("gpt2", True), ("lfm2", True), ("gpt_oss", True)])
def test_at_16_bits_the_logits_are_the_originals(name: str, dynamic: bool | None) -> None:
    """Where Dynamo is not told to expect any length, it compiles the second chunk's graph for that."""
    text, plan = ids(110), plan_for(name)
    model = torch.compile(original(name), backend="kvmix", dynamic=dynamic, options={"plan": plan, "backend": "eager"})
    found = logits(model, static_cache(name), text, 40, 1, 30)
    assert close(found, original(name)(text, use_cache=False).logits)


def test_a_single_row_beyond_its_window() -> None:
    """PyTorch writes it to a window's slot without its batch."""
    text = ids(40, rows=1)
    found = logits(compiled("mistral"), static_cache("mistral"), text, 30)
    assert close(found, original("mistral")(text, use_cache=False).logits)


def test_the_same_plan_gives_the_logits_and_the_bytes_of_apply() -> None:
    name = "gemma3"
    text, past = ids(150), static_cache(name)
    twin = applied(original(name), plan=with_fingerprint(name), verify=False)
    own = KVMixCache(twin)
    found = logits(compiled(name, low(name)), past, text, 100, 1, 20)
    expected = logits(twin, own, text, 100, 1, 20)
    assert close(found, expected)
    assert held(past).nbytes == own.nbytes
    assert not close(found, original(name)(text, use_cache=False).logits)


def with_fingerprint(name: str) -> Plan:
    from kvmix_compile.passes.measure.importance import fingerprint

    captured = captured_once(original(name))
    return replace(low(name), fingerprint=fingerprint(captured, find_sites(captured).matched))


def test_a_plan_with_a_shorter_window_than_the_models_is_refused() -> None:
    model = compiled("mistral", plan_for("mistral").with_windows([WINDOW - 1] * 2))
    with pytest.raises(PlanError, match=r"keeps the last 23 tokens of model\.layers\.0\.self_attn, .* attends to 24"):
        model(ids(40), **with_cache(static_cache("mistral")))
    model, past = compiled("llama", plan_for("llama").with_windows([WINDOW])), static_cache("llama")
    assert close(logits(model, past, ids(WINDOW), WINDOW - 1), original("llama")(ids(WINDOW), use_cache=False).logits)
    with pytest.raises(CacheError, match=r"attends to its last 24 tokens, and its StaticCache keeps all 25"):
        model(ids(1), **with_cache(past))


def test_the_same_perplexity_as_apply() -> None:
    text = ids(200, 1)
    twin = applied(original("llama"), plan=with_fingerprint("llama"), verify=False)
    found = kvmix_compile.perplexity(
        compiled("llama", low("llama")), text, chunk=64, window=128, new_cache=lambda: static_cache("llama")
    )
    assert found == pytest.approx(kvmix_compile.perplexity(twin, text, chunk=64, window=128), rel=1e-4)


def test_inductor_compiles_the_rest() -> None:
    model, plan = fresh("llama"), low("llama")
    found = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        step = torch.compile(model, backend="kvmix", options={"plan": plan, "backend": inner})
        found.append(logits(step, StaticCache(model.config, max_cache_len=SLOTS), ids(120), 60))
    assert close(*found)


def test_bfloat16() -> None:
    model = fresh("llama").to(torch.bfloat16)
    model_compiled = torch.compile(model, backend="kvmix", options={"plan": plan_for("llama"), "backend": "eager"})
    text, past = ids(90), static_cache("llama")
    found = logits(model_compiled, past, text, 80)
    expected = model(text, use_cache=False).logits
    assert (found - expected).float().square().mean().sqrt() < 0.1 * expected.float().std()
    assert held(past).states[0].recent_k.dtype == torch.bfloat16


# Generation


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam search": {"num_beams": 3},
    "chunked prompt": {"prefill_chunk_size": 16},
}


@pytest.mark.parametrize(("name", "way"), [("llama", "greedy"), *(("gemma3", way) for way in WAYS)])
def test_generate_gives_the_originals_text(name: str, way: str) -> None:
    text, mask = padded(40)
    options = {"attention_mask": mask, "cache_implementation": "static", **GREEDY, **WAYS[way]}
    model = fresh(name)
    model.compile(backend="kvmix", options={"plan": plan_for(name), "backend": "eager"})
    expected = original(name).generate(text, **options)
    for _ in range(2):
        assert torch.equal(model.generate(text, **options), expected)


# Of a window that is full nobody says how much it has seen; what is in it counts.
ADOPTED = {"llama": [40 - 7, 40], "mistral": [WINDOW, WINDOW]}


@pytest.mark.parametrize("name", ADOPTED)
def test_what_was_prompted_without_being_compiled_is_packed_on_the_first_step(name: str) -> None:
    """As on GPUs: transformers compiles the steps of decoding alone."""
    config = CompileConfig(backend="kvmix", mode=None, options={"plan": plan_for(name), "backend": "eager"})
    config._compile_all_devices = True
    text, mask = padded(40)
    options = {"attention_mask": mask, "cache_implementation": "static", **GREEDY}
    expected, model = original(name).generate(text, **options), fresh(name)
    for _ in range(2):
        answer = model.generate(text, compile_config=config, return_dict_in_generate=True, **options)
        assert torch.equal(answer.sequences, expected)
        assert held(cache_in(answer)).lengths.tolist() == [length + 29 for length in ADOPTED[name]]


def test_decoding_2000_tokens_compiles_two_graphs() -> None:
    """One for the prompt and one for every step, whatever room the state has."""
    counting, past = Counting(), static_cache("llama", 2100)
    model = compiled("llama", low("llama"), backend=counting)
    rooms = set()
    for part in ids(2030).split([30, *[1] * 2000], dim=1):
        model(part, **with_cache(past))
        rooms.add(held(past).states[0].blocks)
    assert len(rooms) >= 8
    assert counting.graphs == 2
    assert "kvmix" in counting.cache_tag


# Plans and options


def test_with_only_a_budget_the_model_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def analyze(model: Any, **options: Any) -> Any:
        calls.append(options)
        return kvmix_compile.analyze(model, **options)

    monkeypatch.setattr(backend_plan_module, "analyze", analyze)
    model, text, past = fresh("llama"), ids(40), static_cache("llama")
    calibration = ids(96, 2)
    model.compile(
        backend="kvmix", options={"budget": 2.3, "calibration": calibration, "recent": RECENT, "backend": "eager"}
    )
    model(text, **with_cache(past))
    model(text[:, :1], **with_cache(past))
    plan = held(past).plan
    assert [call["calibration"] is calibration for call in calls] == [True]
    assert plan == analyzed(original("llama"), calibration=calibration, recent=RECENT).allocate(budget=2.3)
    assert plan.policy == "fisher" and 2.0 < plan.code_bits <= 2.3


def test_a_plan_can_be_a_file(tmp_path) -> None:
    low("llama").save(tmp_path / "plan.json")
    past = static_cache("llama")
    logits(compiled("llama", tmp_path / "plan.json"), past, ids(40), 40)  # type: ignore[arg-type]
    assert held(past).plan == low("llama")


def test_wrong_options_say_what_there_is() -> None:
    past = static_cache("llama")
    with pytest.raises(InputError, match="no option 'bits'; it takes plan, budget"):
        logits(compiled("llama", bits=2), past, ids(5), 5)
    with pytest.raises(PlanError, match="either a plan or a budget"):
        logits(compiled("llama", budget=2.3), past, ids(5), 5)
    with pytest.raises(PlanError, match="made for another model"):
        logits(compiled("llama", plan_for("gpt2")), past, ids(5), 5)
    with pytest.raises(PlanError, match="kv_heads=4, this model kv_heads=2"):
        sites = tuple(replace(site, shape=replace(site.shape, kv_heads=4)) for site in plan_for("llama").sites)
        logits(compiled("llama", replace(plan_for("llama"), sites=sites)), past, ids(5), 5)


def with_a_broken_graph() -> PreTrainedModel:
    """Dynamo hands over what comes after the rotary embedding, whose paths begin at `model.model`."""
    model = fresh("llama")
    rotate = model.model.rotary_emb.forward

    def broken(*arguments: Any, **options: Any) -> Any:
        torch._dynamo.graph_break()
        return rotate(*arguments, **options)

    model.model.rotary_emb.forward = broken
    return model


def test_a_plan_is_found_for_a_part_of_a_broken_graph() -> None:
    past, text = static_cache("llama"), ids(90)
    options = {"plan": low("llama"), "backend": "eager"}
    found = logits(torch.compile(with_a_broken_graph(), backend="kvmix", options=options), past, text, 60)
    assert held(past).plan == low("llama")
    torch._dynamo.reset()
    assert close(found, logits(compiled("llama", low("llama")), static_cache("llama"), text, 60))


def test_a_path_that_could_be_two_layers_has_no_plan() -> None:
    site = find_sites(captured_once(original("mistral"))).matched[0]
    with pytest.raises(PlanError, match="no layer 'self_attn'.*graph_breaks"):
        choose_plan(Options(plan=low("mistral")), [replace(site, layer="self_attn")])


# What is refused before anything is changed


def test_a_cache_that_grows_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="cache_implementation='static'"):
        compiled("llama")(ids(5))


def test_alibi_is_refused_by_layer() -> None:
    try:
        tiny("bloom")(ids(5), **with_cache(StaticCache(tiny("bloom").config, max_cache_len=32)))
    except RuntimeError:
        pytest.skip("BLOOM itself does not run on a StaticCache with this release of transformers")
    model = torch.compile(tiny("bloom"), backend="kvmix", options={"plan": plan_for("llama"), "backend": "eager"})
    with pytest.raises(UnsupportedModelError, match="transformer.h.0.self_attention: it adds a bias"):
        model(ids(5), **with_cache(StaticCache(tiny("bloom").config, max_cache_len=32)))


def test_a_bias_is_refused_as_soon_as_it_shows() -> None:
    """Of a first token to itself it may be zero when the graph is made, and not when it runs."""
    values = torch.tensor([[-1.0, 0.0, torch.finfo(torch.float32).min]])[None, None]
    with pytest.raises(UnsupportedModelError, match="layers.3: it adds a bias"):
        SeenMask("layers.3", values, past_is_indexed=True, window=0).allowed(1)
    assert SeenMask("layers.3", values.clamp(max=-1) + 1, True, 0).allowed(1).tolist() == [[[True, True, False]]]


def test_chunks_are_refused_as_soon_as_they_show() -> None:
    model, past = compiled("llama4"), static_cache("llama4")
    with pytest.raises(CacheError, match="attends in chunks or another window use kvmix_compile.apply"):
        model(ids(2 * WINDOW), **with_cache(past))


def test_a_graph_without_a_cache_passes_through_and_says_so_once() -> None:
    counting, model = Counting(), fresh("llama")
    step = torch.compile(model, backend="kvmix", options={"plan": plan_for("llama"), "backend": counting})
    with pytest.warns(UserWarning, match="LlamaForCausalLM .* no KV cache") as caught:
        found = [step(ids(tokens), use_cache=False).logits for tokens in (5, 6, 7)]
    assert close(found[0], original("llama")(ids(5), use_cache=False).logits)
    assert len([warning for warning in caught if "no KV cache" in str(warning.message)]) == 1
    assert counting.graphs == 2


def test_it_is_registered_without_importing_kvmix_compile() -> None:
    code = """
import sys, torch
assert "kvmix" in torch._dynamo.list_backends()
assert not any(name.startswith("kvmix_compile") for name in sys.modules)
torch.compile(torch.nn.Linear(2, 2), backend="kvmix", options={"backend": "eager"})(torch.ones(1, 2))
assert "kvmix_compile.backend" in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_what_transformers_compiles_with_by_default_is_taken() -> None:
    """A mode, and no options."""
    linear = torch.nn.Linear(3, 3)
    found = torch.compile(linear, **CompileConfig(backend="kvmix").to_dict())(torch.ones(2, 3))
    torch.testing.assert_close(found, linear(torch.ones(2, 3)))


def test_the_backend_is_a_function_too() -> None:
    past = static_cache("llama")
    model = torch.compile(original("llama"), backend=kvmix, options={"plan": low("llama"), "backend": "eager"})
    logits(model, past, ids(5), 5)
    assert held(past).seen == 5
