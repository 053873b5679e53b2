"""Bad input: a clear error that says what to do, and nothing changed."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_llama import ids, original, quantized

import kvmix_compile
from kvmix_compile import KVMixCache, KVMixError, Plan
from kvmix_compile.errors import (
    BudgetError,
    CalibrationError,
    CaptureError,
    InputError,
    PlanError,
    UnsupportedModelError,
    VerifyError,
)
from kvmix_compile.models_zoo import plain
from kvmix_compile.models_zoo.tiny import tiny


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that compiling could change about a model: its attributes, its modules and their weights."""
    weights = {name: (id(tensor), tensor._version, tensor.grad) for name, tensor in model.named_parameters()}
    modes = {name: (type(module), module.training) for name, module in model.named_modules()}
    return dict(vars(model)), weights, modes


# Models

MODELS: dict[str, tuple[Callable[[], nn.Module], type[KVMixError], str]] = {
    "an encoder": (lambda: tiny("bert"), UnsupportedModelError, r"encoder"),
    "an encoder-decoder": (lambda: tiny("t5"), CaptureError, r"encoder-decoder.*decoder-only"),
    "a recurrence": (lambda: tiny("mamba"), CaptureError, r"layers\.0\.mixer\.conv1d \(Conv1d\)"),
    "a hybrid": (lambda: tiny("lfm2"), VerifyError, r"conv1d in model\.layers\.0\.conv"),
    "a convolution": (plain.convolution, VerifyError, r"conv1d in layers\.0\.convolution"),
    "a bias on scores": (lambda: Biased().eval(), UnsupportedModelError, r"bias.*not linear in the distance"),
    "no attention": (lambda: TokenByToken().eval(), UnsupportedModelError, r"no attention"),
    "training": (lambda: tiny("llama").train(), CaptureError, r"model\.eval\(\)"),
    "no token ids": (lambda: nn.Linear(8, 8).eval(), CaptureError, r"input_ids"),
}


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
        kvmix_compile.analyze(tiny("bert"), calibration=ids(2, 64))


# Budgets and plans


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5}, r"budget=0\.5 cannot be met.* can average \S+ to \S+ here"),
        ({"storage_budget": 1.0}, r"storage_budget=1 cannot be met.* can average \S+ to \S+ here"),
        ({"budget": 1.5, "policy": "kvmix"}, r"can average 2 to 3\.5 here with policy 'kvmix'"),
        ({"budget": 8, "policy": "kvmix"}, r"can average 2 to 3\.5 here with policy 'kvmix'"),
        ({"budget": -1}, r"positive"),
        ({"budget": float("nan")}, r"positive"),
        ({"budget": 2.3, "storage_budget": 3}, r"either budget.*or storage_budget"),
        ({"budget": 2.3, "policy": "guess"}, r"no policy 'guess'; choose one of fisher"),
        ({"budget": 2.3, "recent": 8}, r"32"),
        ({"budget": 2.3, "sinks": -1}, r"sinks"),
        ({"budget": 2.3, "tail": "short"}, r"no tail 'short'; choose one of window, rpc"),
    ],
)
def test_a_budget_that_cannot_be_met_says_what_can(options: dict[str, Any], message: str) -> None:
    model = plain.fused_arange()
    before = snapshot(model)
    with pytest.raises(KVMixError, match=message):
        kvmix_compile.apply(model, calibration=ids(2, 64), **options)
    assert snapshot(model) == before


def test_the_range_that_is_named_is_reachable() -> None:
    model = plain.fused_arange()
    importance = kvmix_compile.analyze(model, calibration=ids(2, 64), sinks=0)
    with pytest.raises(BudgetError) as raised:
        importance.allocate(budget=0.1)
    words = str(raised.value).split()
    low = float(words[words.index("average") + 1])
    assert importance.allocate(budget=low).code_bits == pytest.approx(low, abs=1e-3)


def test_a_plan_and_a_budget_exclude_each_other() -> None:
    with pytest.raises(PlanError, match="either a plan or a budget"):
        kvmix_compile.apply(original(), plan=quantized().kvmix_plan, budget=3)


@pytest.mark.parametrize(
    "other", [plain.fused_arange, lambda: tiny("llama", num_hidden_layers=1), lambda: tiny("qwen2")]
)
def test_a_plan_made_for_another_model_is_refused(other: Callable[[], nn.Module]) -> None:
    model = other()
    before = snapshot(model)
    with pytest.raises(PlanError, match="another model.*Make a new plan"):
        kvmix_compile.apply(model, plan=quantized().kvmix_plan)
    assert snapshot(model) == before


def test_a_plan_is_for_a_structure_whatever_the_weights() -> None:
    model = kvmix_compile.apply(tiny("llama", seed=5), plan=quantized().kvmix_plan)
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
    assert kvmix_compile.apply(original(), plan=str(tmp_path / "plan.json")).kvmix_plan == quantized().kvmix_plan


# Calibration


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "."),
        (torch.zeros(0, dtype=torch.int64), "."),
        ([[]], "."),
        ([3, 4, 5], "32"),
        (["a text"], "tokenizer"),
        (torch.full((1, 64), 500), "500 is outside the model's vocabulary of 128"),
        (torch.rand(1, 64), "integers"),
        (3.5, "float"),
    ],
)
def test_calibration_data_that_cannot_be_used_is_refused(calibration: Any, message: str) -> None:
    model = original()
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=message):
        kvmix_compile.apply(model, budget=2.3, calibration=calibration)
    assert snapshot(model) == before


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
    "embeddings": (lambda: {"inputs_embeds": torch.zeros(2, 20, 128)}, "inputs_embeds is not available"),
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
    model = kvmix_compile.apply(plain.fused_arange(), budget=3, calibration=ids(2, 64), sinks=0, recent=32)
    mask = torch.ones(2, 20, dtype=torch.int64)
    assert model(ids(2, 20), attention_mask=mask).shape == (2, 20, 128)
    mask[1, :5] = 0
    with pytest.raises(InputError, match="rows of equal length"):
        model(ids(2, 20), attention_mask=mask)


def test_attentions_and_hidden_states_are_not_available() -> None:
    for name in ("output_attentions", "output_hidden_states"):
        assert quantized()(ids(1, 9), **{name: False}).logits.shape == (1, 9, 128)
        with pytest.raises(InputError, match=f"{name} is not available.*original model"):
            quantized()(ids(1, 9), **{name: True})
