"""Bad input: a clear error that says what to do, and nothing changed."""

import json
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

import kvmix_compile
from kvmix_compile import KVMixCache, KVMixError, Plan, compiler
from kvmix_compile.errors import (
    BudgetError,
    CaptureError,
    InputError,
    PlanError,
    UnsupportedModelError,
    VerifyError,
)
from kvmix_compile.models_zoo import plain
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.measure.importance import Importance
from tests.helpers.hybrid import hybrid
from tests.helpers.one_capture import analyzed, applied, zoo
from tests.helpers.toy_llama import ids, lossless, original, quantized


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that compiling could change about a model: its attributes, its modules and their weights."""
    weights = {name: (id(tensor), tensor._version, tensor.grad) for name, tensor in model.named_parameters()}
    modes = {name: (type(module), module.training) for name, module in model.named_modules()}
    return dict(vars(model)), weights, modes


# Models

MODELS: dict[str, tuple[Callable[[], nn.Module], type[KVMixError], str]] = {
    "an encoder": (lambda: tiny("bert", num_hidden_layers=1), UnsupportedModelError, r"encoder"),
    "an encoder-decoder": (lambda: tiny("t5"), CaptureError, r"encoder-decoder.*decoder-only"),
    "a recurrence": (
        lambda: tiny("mamba", num_hidden_layers=1),
        UnsupportedModelError,
        r"layers\.0\.mixer.*no KV cache",
    ),
    "a state that is lost": (lambda: hybrid("forgets"), CaptureError, r"recurrence carries a state.*backend='kvmix'"),
    "a convolution": (plain.convolution, VerifyError, r"conv1d in layers\.0\.convolution"),
    "a bias on scores": (lambda: Biased().eval(), UnsupportedModelError, r"bias.*not linear in the distance"),
    "no attention": (lambda: TokenByToken().eval(), UnsupportedModelError, r"no attention"),
    "training": (lambda: tiny("llama").train(), CaptureError, r"model\.eval\(\)"),
    "no token ids": (lambda: nn.Linear(8, 8).eval(), CaptureError, r"input_ids"),
    "compiled already": (quantized, CaptureError, r"compiled by kvmix_compile already.*original model"),
    "compiled by torch": (lambda: torch.compile(tiny("llama"), backend="eager"), CaptureError, r"model\._orig_mod"),
    "in parallel": (lambda: nn.DataParallel(tiny("llama")), CaptureError, r"a DataParallel wraps.*model\.module"),
    "not in memory": (lambda: tiny("llama").to("meta"), CaptureError, r"offloaded.*onto one device"),
    "offloaded to memory": (
        lambda: cpu_offload(tiny("llama"), execution_device="cpu"),
        CaptureError,
        r"model\.embed_tokens\.weight of the model is not in memory but offloaded.*onto one device",
    ),
    "offloaded to a disk": (lambda: offloaded_to_a_disk(), CaptureError, r"not in memory but offloaded"),
    "packed weights": (lambda: with_packed_weights(), CaptureError, r"q_proj.*packed for torch\.ao.*before it was"),
    "no weights": (lambda: Weightless().eval(), CaptureError, r"no floating-point parameter"),
}


def with_packed_weights() -> nn.Module:
    model = tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated
        packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(torch.ones(8, 8), 0.1, 0, torch.qint8))
    model.model.layers[0].self_attn.q_proj.packed = packed
    return model


def offloaded_to_a_disk() -> nn.Module:
    with TemporaryDirectory() as folder:  # where nothing is read again
        return disk_offload(tiny("llama"), folder, execution_device="cpu")


class Weightless(nn.Module):
    """What is left of a model whose weights are all kept as something else."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.one_hot(input_ids, 128).float()


class TokenByToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(128, 16), nn.Linear(16, 128)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embedding(input_ids))


class Biased(nn.Module):
    """Attention that prefers near tokens, by the square root of their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(128, 16), nn.Linear(16, 128)

    def forward(self, input_ids: Tensor) -> Tensor:
        states, token = self.embedding(input_ids)[:, None], torch.arange(input_ids.shape[1])
        distance = token[:, None] - token
        bias = (-distance.abs().float().sqrt()).masked_fill(distance < 0, -torch.inf)
        return self.head(F.scaled_dot_product_attention(states, states, states, bias)[:, 0])


@pytest.mark.parametrize("what", MODELS)
def test_a_model_that_cannot_be_compiled_says_why_and_stays_as_it_was(what: str) -> None:
    build, error, message = MODELS[what]
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=message) as raised:
        kvmix_compile.apply(model, calibration=ids(2, 64))
    assert len(str(raised.value)) > 30
    assert snapshot(model) == before


@pytest.mark.parametrize("what", ["an encoder", "a convolution", "a bias on scores", "training"])
def test_a_diagnosis_names_the_problem_and_does_not_raise(what: str) -> None:
    build, _, message = MODELS[what]
    report = kvmix_compile.diagnose(build())
    assert report.problem is not None and "PROBLEM" in str(report)
    assert re.search(message, report.problem)


def test_analyze_refuses_the_same_models() -> None:
    with pytest.raises(UnsupportedModelError):
        kvmix_compile.analyze(tiny("bert", num_hidden_layers=1), calibration=ids(2, 64))
    with pytest.raises(CaptureError, match="compiled by kvmix_compile already"):
        kvmix_compile.analyze(quantized(), calibration=ids(2, 64))


@pytest.mark.parametrize("what", ["gpt2", None])
def test_a_name_is_no_model(what: Any) -> None:
    with pytest.raises(CaptureError, match=f"the model is a {type(what).__name__}: load it first"):
        kvmix_compile.apply(what)


# Arguments: refused before anything long is done

ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "a budget without its point": ({"budget": 23}, r"budget must be .* 16 \(nothing quantized\) at most, not 23"),
    "a storage budget without its point": ({"storage_budget": 30}, r"storage_budget must be .* 16 .*at most, not 30"),
    "a negative budget": ({"budget": -1}, r"positive"),
    "no budget": ({"budget": 0}, r"positive"),
    "a budget that is no number": ({"budget": float("nan")}, r"positive"),
    "an endless budget": ({"storage_budget": float("inf")}, r"16 .*at most"),
    "a budget in a string": ({"budget": "2.3"}, r"budget is a number of bits an element, such as 2\.3, not '2\.3'"),
    "a yes for a budget": ({"storage_budget": True}, r"storage_budget is a number .*not True"),
    "a budget too small": ({"budget": 0.5}, r"budget=0\.5 cannot be met.* can average 1 to 16 at most"),
    "a storage budget too small": ({"storage_budget": 0.5}, r"storage_budget=0\.5 cannot be met.* can average 1 to 16"),
    "a uniform budget too small": ({"budget": 0.5, "policy": "uniform"}, r"can average 1 to 16 at most with policy"),
    "two budgets": ({"budget": 2.3, "storage_budget": 3}, r"either budget.*or storage_budget"),
    "an unknown policy": ({"budget": 2.3, "policy": "guess"}, r"no policy 'guess'; choose one of fisher"),
    "no policy": ({"policy": None}, r"no policy None"),
    "too few recent tokens": ({"recent": 8}, r"32"),
    "negative sinks": ({"sinks": -1}, r"sinks"),
    "sinks in a string": ({"sinks": "4"}, r"sinks is a whole number of tokens, not '4'"),
    "a part of a token": ({"recent": 64.5}, r"recent is a whole number of tokens, not 64\.5"),
    "an unknown recent window": ({"recent_window": "short"}, r"no recent window 'short'; choose one of fixed, rpc"),
    "a plan and a budget": ({"plan": "absent.json", "budget": 3}, r"either a plan or a budget"),
    "a plan that is not there": ({"plan": "absent.json"}, r"cannot read the plan absent\.json"),
    "a plan of another kind": ({"plan": {"sites": []}}, r"plan is a dict: pass a kvmix_compile\.Plan"),
    "a tokenizer's name": ({"tokenizer": "gpt2"}, r"tokenizer is a str.*AutoTokenizer"),
    "texts without a tokenizer": ({"calibration": ["a text"]}, r"without a tokenizer: pass tokenizer="),
    "no texts": ({"calibration": []}, r"fewer than 2 tokens"),
    "few tokens": ({"calibration": [3, 4, 5]}, r"32"),
    "tokens of another model": ({"calibration": torch.full((1, 64), 500)}, r"500 is outside the model's vocabulary"),
    "numbers that are no tokens": ({"calibration": torch.rand(1, 64)}, r"integers"),
    "a number for a text": ({"calibration": 3.5}, r"float"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_are_refused_before_anything_is_captured(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "capture", not_reached)
    options, message = ARGUMENTS[what]
    before = snapshot(original())
    with pytest.raises(KVMixError, match=message):
        kvmix_compile.apply(original(), **{"calibration": ids(2, 64)} | options)
    assert snapshot(original()) == before


def not_reached(*arguments: Any, **options: Any) -> None:
    raise AssertionError("this takes long, and what was asked for cannot be done")


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {"storage_budget": 1.1}, r"storage_budget=1\.1 cannot be met.* can average 1\.\d+ to 16 here"),
        ({}, {"budget": 8, "policy": "kvmix"}, r"can average 2 to 3\.5 here with policy 'kvmix'"),
        ({"head_dim": 100}, {"budget": 2.5}, r"16 to 16 here, as heads of 100 channels.*multiples of 8.*budget=16"),
        ({"head_dim": 100}, {"budget": 2.5, "policy": "uniform"}, r"a head of 100 channels.*multiple of 8"),
    ],
)
def test_what_the_models_shape_rules_out_is_refused_before_anything_is_measured(
    settings: dict[str, Any], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("measure", "verify_rewrite"):
        monkeypatch.setattr(compiler, name, not_reached)
    with pytest.raises(KVMixError, match=message):
        kvmix_compile.apply(tiny("llama", **settings), calibration=ids(2, 64), **options)


# Budgets and plans


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5}, r"budget=0\.5 cannot be met.* can average \S+ to \S+ here"),
        ({"storage_budget": 1.0}, r"storage_budget=1 cannot be met.* can average \S+ to \S+ here"),
        ({"budget": 1.5, "policy": "kvmix"}, r"can average 2 to 3\.5 here with policy 'kvmix'"),
        ({"budget": 8, "policy": "kvmix"}, r"can average 2 to 3\.5 here with policy 'kvmix'"),
        ({"budget": 23}, r"budget must be .*16 .*at most, not 23"),
        ({"storage_budget": "3"}, r"storage_budget is a number"),
        ({"budget": float("nan")}, r"positive"),
        ({}, r"either budget.*or storage_budget"),
    ],
)
def test_a_budget_that_cannot_be_met_says_what_can(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KVMixError, match=message):
        measured().allocate(**options)


@cache
def measured() -> Importance:
    return analyzed(zoo("fused_arange"), calibration=ids(2, 64), sinks=0)


def test_the_range_that_is_named_is_reachable() -> None:
    with pytest.raises(BudgetError) as raised:
        measured().allocate(budget=0.1)
    words = str(raised.value).split()
    low = float(words[words.index("average") + 1])
    assert measured().allocate(budget=low).code_bits == pytest.approx(low, abs=1e-3)


@pytest.mark.parametrize(
    "other", [lambda: zoo("fused_arange"), lambda: tiny("llama", num_hidden_layers=1), lambda: zoo("gpt2")]
)
def test_a_plan_made_for_another_model_is_refused(other: Callable[[], nn.Module]) -> None:
    model = other()
    before = snapshot(model)
    with pytest.raises(PlanError, match="another model.*Make a new plan"):
        applied(model, plan=quantized().kvmix_plan)
    assert snapshot(model) == before


@cache
def of_other_weights() -> PreTrainedModel:
    return tiny("llama", seed=5)


def test_a_plan_is_for_a_structure_whatever_the_weights() -> None:
    model = applied(of_other_weights(), plan=quantized().kvmix_plan)
    assert model.kvmix_plan == quantized().kvmix_plan


def test_damaged_and_future_plan_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    quantized().kvmix_plan.save(file)
    document = json.loads(file.read_text())
    for content, message in (
        (file.read_text()[:-20], "damaged"),
        (json.dumps(document | {"version": 99}), "upgrade kvmix_compile"),
        (json.dumps(document | {"sites": []}), "at least one"),
        ("[1, 2]", "not a plan"),
    ):
        file.write_text(content)
        with pytest.raises(PlanError, match=message):
            kvmix_compile.apply(original(), plan=file)
    with pytest.raises(PlanError, match="cannot read the plan"):
        kvmix_compile.apply(original(), plan=str(tmp_path / "absent.json"))


def test_a_plan_file_does_what_the_plan_does(tmp_path: Path) -> None:
    quantized().kvmix_plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == quantized().kvmix_plan
    assert applied(original(), plan=str(tmp_path / "plan.json")).kvmix_plan == quantized().kvmix_plan


# Calls of the compiled model


CALLS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a 4-D mask": (lambda: {"attention_mask": torch.zeros(2, 1, 20, 20)}, r"must be \[batch, tokens\]"),
    "a mask of another batch": (lambda: {"attention_mask": torch.ones(3, 20)}, r"must be \[batch, tokens\]"),
    "a mask too short": (lambda: {"attention_mask": torch.ones(2, 9)}, r"must be \[batch, tokens\]"),
    "tokens on another device": (lambda: {"input_ids": ids(2, 20).to("meta")}, r"input_ids\.to\(model\.device\)"),
    "a row without batch": (lambda: {"input_ids": ids(1, 20)[0]}, r"\[batch, tokens\]"),
    "no tokens": (lambda: {"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "at least one"),
    "numbers that are no ids": (lambda: {"input_ids": torch.rand(2, 20)}, "int64"),
    "an id outside the vocabulary": (lambda: {"input_ids": torch.full((2, 20), 128)}, "0 to 127"),
    "labels for some logits": (lambda: {"labels": ids(2, 20), "logits_to_keep": 3}, "leave logits_to_keep out"),
    "labels of another length": (lambda: {"labels": ids(2, 19)}, "one label for each token"),
    "embeddings too": (lambda: {"inputs_embeds": torch.zeros(2, 20, 128)}, "both given"),
    "texts": (lambda: {"input_ids": ["some", "texts"]}, "input_ids is a list.*tokenizer"),
    "nothing": (lambda: {"input_ids": None}, "input_ids is missing"),
    "a prompt too long": (lambda: {"input_ids": ids(2, 513)}, "more than the 512 positions.*shorten"),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("filled", [False, True])
def test_a_bad_call_is_refused_and_the_cache_stays_as_it_was(what: str, filled: bool) -> None:
    build, message = CALLS[what]
    past = KVMixCache(quantized())
    if filled:
        quantized()(ids(2, 90, seed=2), past_key_values=past)
    before = [tensor.clone() for tensor in past.tensors()]
    with pytest.raises(KVMixError, match=message):
        quantized()(**{"input_ids": ids(2, 20), "past_key_values": past} | build())
    assert past.get_seq_length() == 90 * filled and past.lengths.tolist() == [90, 90][: 2 * filled]
    assert past.is_initialized == filled and len(past.tensors()) == len(before)
    assert all(torch.equal(one, other) for one, other in zip(past.tensors(), before, strict=True))


def test_a_continuation_beyond_the_positions_is_refused() -> None:
    past = KVMixCache(quantized())
    quantized()(ids(1, 500), past_key_values=past)
    with pytest.raises(InputError, match="513 tokens are more than the 512 positions"):
        quantized()(ids(1, 13), past_key_values=past)
    assert quantized()(ids(1, 12), past_key_values=past).logits.shape == (1, 12, 128)


def test_a_token_that_is_held_cannot_be_masked_later() -> None:
    past = KVMixCache(quantized())
    quantized()(ids(2, 20), past_key_values=past)
    mask = torch.ones(2, 25, dtype=torch.int64)
    mask[0, 3] = 0
    with pytest.raises(KVMixError, match="attention_mask"):
        quantized()(ids(2, 5), attention_mask=mask, past_key_values=past)
    assert past.get_seq_length() == 20


def test_a_model_that_counts_its_own_positions_takes_no_padding() -> None:
    model = applied(zoo("fused_arange"), budget=3, calibration=ids(2, 64), sinks=0, recent=32)
    mask = torch.ones(2, 20, dtype=torch.int64)
    assert model(ids(2, 20), attention_mask=mask).shape == (2, 20, 128)
    mask[1, :5] = 0
    with pytest.raises(InputError, match="rows of equal length"):
        model(ids(2, 20), attention_mask=mask)


@cache
def eager_twin() -> PreTrainedModel:
    model = tiny("llama", attn_implementation="eager")
    return kvmix_compile.apply(model, plan=quantized().kvmix_plan, verify=False)


class WithImages(LlamaForCausalLM):
    """As transformers' models of images and text are: generate gives them what was made of images, if nothing."""

    def forward(self, input_ids=None, mm_encoder_outputs=None, **kwargs):
        assert not mm_encoder_outputs
        return super().forward(input_ids, **kwargs)


def test_models_of_images_and_text_write_text_and_refuse_images() -> None:
    model = WithImages(zoo("llama").config).eval()
    small = kvmix_compile.apply(model, plan=lossless().kvmix_plan, verify=False)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    assert torch.equal(small.generate(ids(1, 50), **options), model.generate(ids(1, 50), **options))
    assert small(ids(1, 9), mm_encoder_outputs={}).logits.shape == (1, 9, 128)
    with pytest.raises(InputError, match="mm_encoder_outputs is not available from a compiled model"):
        small(ids(1, 9), mm_encoder_outputs={"image": torch.zeros(1)})


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_attentions_and_hidden_states_are_not_available(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantized()(ids(1, 9), **{name: False}).logits.shape == (1, 9, 128)
    with pytest.raises(InputError, match=f"{name} is not available.*original model"):
        quantized()(ids(1, 9), **{name: True})
    small = eager_twin()
    monkeypatch.setattr(small.config, name, True)
    with pytest.raises(InputError, match=rf"model\.config\.{name}.*set it to False"):
        small(ids(1, 9))
    assert small(ids(1, 9), **{name: False}).logits.shape == (1, 9, 128)


# What else a user may do


def with_a_cache_of_other_weights() -> Any:
    other = applied(of_other_weights(), plan=quantized().kvmix_plan, verify=False)
    past = KVMixCache(other)
    other(ids(1, 40), cache=past)
    return quantized()(ids(1, 9), cache=past)


def shorter_than_the_cache() -> Any:
    past = KVMixCache(quantized())
    quantized()(ids(1, 40), cache=past)
    return quantized().generate(ids(1, 40)[:, :5], cache=past)


@cache
def twin_with_a_cache_implementation() -> PreTrainedModel:
    """Of a model of its own, whose configuration a test writes."""
    return kvmix_compile.apply(tiny("llama"), plan=quantized().kvmix_plan, verify=False)


def configured_for_another_cache() -> Any:
    small = twin_with_a_cache_implementation()
    small.generation_config.cache_implementation = "static"
    return small.generate(ids(1, 9))


def resized() -> Any:
    model = tiny("llama")
    small = kvmix_compile.apply(model, plan=quantized().kvmix_plan, verify=False)
    model.resize_token_embeddings(140)
    return small(ids(1, 9))


USES: dict[str, tuple[Callable[[], Any], str]] = {
    "a cache of the original": (lambda: KVMixCache(original()), r"is not compiled.*kvmix_compile\.apply\(model\)"),
    "a cache that takes back less than nothing": (lambda: KVMixCache(quantized(), rollback=-1), "rollback.*0 or more"),
    "texts to go on from": (lambda: quantized().generate(["a text"]), "the prompt is a list.*tokenizer"),
    "a prompt shorter than its cache": (shorter_than_the_cache, "the prompt has 5 tokens and the cache .* holds 40"),
    "a cache of other weights": (with_a_cache_of_other_weights, "filled by a model with other weights"),
    "another cache by configuration": (configured_for_another_cache, r"cache_implementation is 'static'.*to None"),
    "continuous batching": (lambda: quantized().generate_batch([[3, 4]]), "generate_batch.*padded on the left"),
    "a manager of continuous batching": (lambda: quantized().init_continuous_batching(), "init_continuous_batching"),
    "paged batches": (lambda: quantized().generate(ids(1, 9), cache_implementation="paged"), "cache_implementation"),
    "training": (lambda: quantized().train(), "not trained: train the original"),
    "checkpointed gradients": (lambda: quantized().gradient_checkpointing_enable(), "not trained"),
    "other embeddings": (lambda: quantized().resize_token_embeddings(140), "resize the original model's"),
    "other embeddings of the original": (resized, "140 token embeddings .*compiled with 128.*apply"),
    "a compiled model from a folder": (lambda: type(quantized())(original().config), "load the original model"),
}


@pytest.mark.parametrize("what", USES)
def test_what_is_not_available_is_said_in_a_sentence(what: str) -> None:
    use, message = USES[what]
    before = snapshot(original())
    with pytest.raises(KVMixError, match=message):
        use()
    assert snapshot(original()) == before


def test_a_cache_that_models_store_in_vain_is_no_obstacle() -> None:
    small = twin_with_a_cache_implementation()
    small.generation_config.cache_implementation = "hybrid"  # as old models of the Gemma family do
    assert small.generate(ids(1, 9), max_new_tokens=2, eos_token_id=None, pad_token_id=0).shape == (1, 11)
