"""torch.compile(model, backend="kvmix"): what belongs to a StaticCache, whatever transformers does with it."""

import copy
import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch.compiler import config as compiler_config
from transformers import CompileConfig, PreTrainedModel, StaticCache

import kvmix_compile
from kvmix_compile import KVMixCache, Plan
from kvmix_compile.backend import kvmix, packed_cache
from kvmix_compile.backend import plan as backend_plan_module
from kvmix_compile.backend import storage as storage_module
from kvmix_compile.backend.padding import SeenMask
from kvmix_compile.backend.plan import Options, choose_plan
from kvmix_compile.errors import CacheError, InputError, PlanError, UnsupportedModelError
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.models_zoo.tiny import WINDOW, tiny
from kvmix_compile.passes.allocate.plan import SitePlan
from kvmix_compile.passes.capture.signature import cache_in
from kvmix_compile.passes.match.sites import find_sites
from tests.helpers.agreement import assert_states_agree
from tests.helpers.cache_argument import with_cache
from tests.helpers.one_capture import analyzed, applied, captured_once

LOSSLESS = Precision(16)
SINKS, RECENT = 4, 32
SLOTS = 256
GREEDY = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


pytestmark = pytest.mark.usefixtures("dynamo_begins_anew")


def ids(tokens: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@cache
def original(name: str) -> PreTrainedModel:
    """Not to be compiled in place."""
    return tiny(name)


@cache
def plan_for(name: str, key: Precision = LOSSLESS, value: Precision = LOSSLESS) -> Plan:
    sites = find_sites(captured_once(original(name))).matched
    planned = tuple(SitePlan(site.layer, site.shape, key, value) for site in sites)
    return Plan(planned, "by hand", "", SINKS, RECENT)


@cache
def low(name: str) -> Plan:
    """Keys with important channels, the even ones, and values of 2 bits."""
    key, tiers = Precision(2, 32, 4, important_bits=(4, 3)), "3120" * 8
    sites = plan_for(name, value=Precision(2, 32, 4)).sites
    important = tuple(replace(site, key=key, channel_tiers=(tiers,) * site.kv_heads) for site in sites)
    return replace(plan_for(name), sites=important)


class Counting:
    """An inner backend that counts what it compiles."""

    def __init__(self) -> None:
        self.graphs = 0
        self.cache_tag = ""

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        self.cache_tag = compiler_config.cache_key_tag
        return lookup_backend("eager")(module, inputs)


def compiled(name: str, plan: Plan | None = None, **options: Any) -> Any:
    chosen = {"plan": plan or plan_for(name), "backend": "eager", **options}
    return torch.compile(original(name), backend="kvmix", options=chosen)


def static_cache(name: str, slots: int = SLOTS) -> StaticCache:
    return StaticCache(original(name).config, max_cache_len=slots)


def logits(model: Any, past: Any, text: Tensor, *chunks: int, **options: Any) -> Tensor:
    """Of the text read in chunks of these sizes, the rest token by token."""
    sizes = [*chunks, *[1] * (text.shape[1] - sum(chunks))]
    found = [model(input_ids=part, **with_cache(past), **options).logits for part in text.split(sizes, dim=1)]
    return torch.cat(found, dim=1)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-3 * expected.std())


def held(past: StaticCache) -> KVMixCache:
    found = packed_cache(past)
    assert found is not None
    return found


# The same as the original without quantization, and as `apply` with it


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "lfm2", "gpt_oss"])
def test_at_16_bits_the_logits_are_the_originals(name: str) -> None:
    text = ids(110)
    found = logits(compiled(name), static_cache(name), text, 40, 1, 30)
    assert close(found, original(name)(text, use_cache=False).logits)


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
    model, past = compiled("llama", plan_for("llama").with_windows([WINDOW] * 2)), static_cache("llama")
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
    model = tiny("llama", num_hidden_layers=1)
    plan = replace(low("llama"), sites=low("llama").sites[:1])
    found = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        step = torch.compile(model, backend="kvmix", options={"plan": plan, "backend": inner})
        found.append(logits(step, StaticCache(model.config, max_cache_len=SLOTS), ids(120), 60))
    assert close(*found)


def test_bfloat16() -> None:
    model = tiny("llama").to(torch.bfloat16)
    model_compiled = torch.compile(model, backend="kvmix", options={"plan": plan_for("llama"), "backend": "eager"})
    text, past = ids(90), static_cache("llama")
    found = logits(model_compiled, past, text, 80)
    expected = model(text, use_cache=False).logits
    assert (found - expected).float().square().mean().sqrt() < 0.1 * expected.float().std()
    assert held(past).states[0].recent_k.dtype == torch.bfloat16


# Generation


def padded(tokens: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, tokens, dtype=torch.int64)
    mask[0, :7] = 0
    return ids(tokens), mask


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam search": {"num_beams": 3},
    "chunked prompt": {"prefill_chunk_size": 16},
}


@pytest.mark.parametrize(("name", "way"), [("llama", "greedy"), *(("gemma3", way) for way in WAYS)])
def test_generate_gives_the_originals_text(name: str, way: str) -> None:
    text, mask = padded(40)
    options = {"attention_mask": mask, "cache_implementation": "static", **GREEDY, **WAYS[way]}
    model = tiny(name)
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
    expected, model = original(name).generate(text, **options), tiny(name)
    for _ in range(2):
        answer = model.generate(text, compile_config=config, return_dict_in_generate=True, **options)
        assert torch.equal(answer.sequences, expected)
        assert held(cache_in(answer)).lengths.tolist() == [length + 29 for length in ADOPTED[name]]


def test_a_row_that_was_prompted_elsewhere_holds_what_it_would_hold_here() -> None:
    text, mask = padded(90)
    here, adopted, step = static_cache("llama"), static_cache("llama"), compiled("llama", low("llama"))
    for model, past in ((step, here), (original("llama"), adopted)):
        model(text, attention_mask=mask, **with_cache(past))
    for past in (here, adopted):
        step(text[:, :1], attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1), **with_cache(past))
    for one, other, layout in zip(held(here).states, held(adopted).states, held(here).layouts, strict=True):
        assert_states_agree(one, other, layout)


# What belongs to a cache


def storage_of(past: StaticCache) -> int:
    buffers = [buffer for layer in past.layers for buffer in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, buffers)}.values())


def test_the_16_bit_storage_is_released() -> None:
    past, adopted = static_cache("llama"), static_cache("llama")
    full = 2 * 2 * 2 * 2 * SLOTS * 32 * 4  # layers, sides, rows, heads, slots, channels, bytes
    model = compiled("llama", low("llama"))
    logits(model, past, ids(41), 40)
    original("llama")(ids(40), **with_cache(adopted))
    assert storage_of(adopted) == full
    logits(model, adopted, ids(1))
    for one in (past, adopted):
        assert storage_of(one) < 2000
        assert one.layers[0].keys.shape == (2, 2, SLOTS, 32)
        assert one.layers[0].keys.isnan().all()


def test_two_caches_used_in_turn_stay_separate() -> None:
    model, texts = compiled("llama"), [ids(80, seed=seed) for seed in (1, 2)]
    caches = [static_cache("llama"), static_cache("llama")]
    found: list[list[Tensor]] = [[], []]
    for begin, end in ((0, 60), *((token, token + 1) for token in range(60, 80))):
        for which in (0, 1):
            found[which].append(model(texts[which][:, begin:end], **with_cache(caches[which])).logits)
    for which in (0, 1):
        assert close(torch.cat(found[which], 1), original("llama")(texts[which], use_cache=False).logits)


def test_a_dropped_cache_frees_its_state() -> None:
    model, past = compiled("llama"), static_cache("llama")
    logits(model, past, ids(41), 40)
    gc.collect()
    before, packed = len(storage_module._packed_sites), held(past)
    tensors = {tensor.data_ptr() for tensor in packed.tensors()}
    del past, packed
    gc.collect()
    assert len(storage_module._packed_sites) == before - 4
    alive = {item.data_ptr() for item in gc.get_objects() if type(item) is Tensor and item.device.type == "cpu"}
    assert not tensors & alive


def test_a_cache_begins_anew_after_reset() -> None:
    model, past = compiled("llama"), static_cache("llama")
    first, again = ids(90, seed=1), ids(50, seed=2)
    logits(model, past, first, 60)
    past.reset()
    assert packed_cache(past) is None
    assert close(logits(model, past, again, 45), original("llama")(again, use_cache=False).logits)
    assert held(past).lengths.tolist() == [50, 50]


def test_a_cache_that_was_reset_can_be_used_without_being_compiled() -> None:
    past, text = static_cache("llama"), ids(50)
    logits(compiled("llama"), past, ids(41), 40)
    with pytest.raises(CacheError, match="reset"):
        original("llama")(text, **with_cache(past))
    past.reset()
    assert close(logits(original("llama"), past, text, 40), original("llama")(text, use_cache=False).logits)


def test_a_copy_of_a_cache_is_refused() -> None:
    model, past = compiled("llama"), static_cache("llama")
    logits(model, past, ids(40), 40)
    with pytest.raises(CacheError, match="copies do not have them"):
        logits(model, copy.deepcopy(past), ids(1))


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
    model, text, past = tiny("llama"), ids(40), static_cache("llama")
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


def test_a_cache_of_another_plan_is_refused() -> None:
    past = static_cache("llama")
    logits(compiled("llama", low("llama")), past, ids(40), 40)
    torch._dynamo.reset()
    with pytest.raises(CacheError, match="another plan"):
        logits(compiled("llama"), past, ids(1))


def with_a_broken_graph() -> PreTrainedModel:
    """Dynamo hands over what comes after the rotary embedding, whose paths begin at `model.model`."""
    model = tiny("llama")
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
    site = find_sites(captured_once(original("llama"))).matched[0]
    with pytest.raises(PlanError, match="no layer 'self_attn'.*graph_breaks"):
        choose_plan(Options(plan=low("llama")), [replace(site, layer="self_attn")])


# What is refused before anything is changed


def test_more_tokens_than_slots_are_refused() -> None:
    model, past = compiled("llama"), static_cache("llama", 32)
    logits(model, past, ids(32), 31)
    with pytest.raises(CacheError, match="33 tokens do not fit into a StaticCache of 32"):
        logits(model, past, ids(1))
    assert held(past).lengths.tolist() == [32, 32]


def test_padding_behind_tokens_is_refused() -> None:
    text, mask = ids(20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, -3:] = 0
    with pytest.raises(CacheError, match="model.layers.0.self_attn.*pad on the left"):
        compiled("llama")(text, attention_mask=mask, **with_cache(static_cache("llama")))


def test_a_mask_that_is_not_causal_is_refused() -> None:
    text, past = ids(20), static_cache("llama")
    everything = torch.zeros(2, 1, 20, SLOTS, dtype=torch.bool)
    everything[..., :20] = True
    with pytest.raises(CacheError, match="neither causal nor the window"):
        compiled("llama")(text, attention_mask=everything, **with_cache(past))


def test_a_cache_that_was_changed_from_outside_is_refused() -> None:
    model, past = compiled("llama"), static_cache("llama")
    logits(model, past, ids(41), 40)
    for layer in past.layers:
        layer.cumulative_length.fill_(20)
    with pytest.raises(CacheError, match="counts 20 tokens and 41 were written"):
        logits(model, past, ids(1))


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
    counting, model = Counting(), tiny("llama")
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


def test_it_runs_under_autocast_as_the_original_does() -> None:
    text = ids(100, 1)
    with torch.no_grad():
        exact = logits(original("llama"), static_cache("llama"), text, 60)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            try:
                expected = logits(original("llama"), static_cache("llama"), text, 60)
            except RuntimeError:
                pytest.skip("this transformers' StaticCache does not run under autocast")
            found = logits(compiled("llama"), static_cache("llama"), text, 60)
    assert found.dtype == expected.dtype
    assert (found - expected).square().mean() <= 1.2 * (expected - exact).square().mean()


def test_a_prompt_read_in_inference_mode_is_decoded_outside() -> None:
    text, past, other = ids(100, 1), static_cache("llama"), static_cache("llama")
    model = compiled("llama", low("llama"))
    with torch.no_grad():
        expected = logits(model, other, text, 60)[:, 60:]
    with torch.inference_mode():
        logits(model, past, text[:, :60], 60)
    with torch.no_grad():
        found = logits(model, past, text[:, 60:])
    assert close(found, expected)
    assert not any(tensor.is_inference() for tensor in held(past).tensors())
