"""Adapters of peft: on the model before it is compiled, merged into it, and put on the compiled model."""

import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from torch import Tensor, nn

import kvmix_compile
from kvmix_compile import KVMixCache, Plan, compiler
from kvmix_compile.errors import CaptureError, InputError, PlanError
from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.toy_llama import ids, lossless, original


@cache
def plan() -> Plan:
    """Of the toy, without quantization."""
    return lossless().kvmix_plan


def with_adapter(seed: int = 1, name: str = "default", **options: object) -> peft.PeftModel:
    """The toy with a low-rank adapter that changes what it writes."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's, about the name of a checkpoint
        return peft.get_peft_model(tiny("llama"), config, adapter_name=name).eval()


def text(model: nn.Module) -> Tensor:
    return model.generate(input_ids=ids(2, 50), max_new_tokens=20, do_sample=False)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one."""
    path = tmp_path_factory.mktemp("adapter")
    with_adapter().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """What the toy writes with it."""
    found = text(with_adapter())
    assert not torch.equal(found, text(original()))
    return found


def test_a_model_with_an_adapter_is_compiled_by_the_plan_of_its_base(expected: Tensor) -> None:
    model = with_adapter(task_type="CAUSAL_LM")
    whole = kvmix_compile.apply(model, plan=plan())
    assert torch.equal(text(whole), text(model)) and isinstance(whole, peft.PeftModel)
    assert any("another version of this model" in note for note in whole.kvmix_report.notes)
    assert [site.layer for site in whole.kvmix_plan.sites] == [site.layer for site in whole.kvmix_report.sites]
    assert text(kvmix_compile.apply(with_adapter().base_model.model, plan=plan())).equal(expected)


def test_strict_refuses_the_plan_of_the_base() -> None:
    with pytest.raises(PlanError, match="another version of this model.*leave strict out"):
        kvmix_compile.apply(with_adapter().base_model.model, plan=plan(), strict=True)
    with pytest.raises(PlanError, match="strict is about a plan"):
        kvmix_compile.apply(original(), strict=True)


def test_a_merged_adapter_leaves_the_model_as_the_plan_knows_it(expected: Tensor) -> None:
    twin = kvmix_compile.apply(with_adapter().merge_and_unload(), plan=plan(), strict=True)
    assert torch.equal(text(twin), expected) and not twin.kvmix_report.notes


def test_what_only_wraps_a_model_says_what_to_pass() -> None:
    with pytest.raises(CaptureError, match="takes no `input_ids`.*wraps another, pass that"):
        kvmix_compile.apply(with_adapter(), plan=plan())


def test_an_adapter_is_loaded_into_a_compiled_model(adapter: Path, expected: Tensor) -> None:
    model = tiny("llama")  # its weights are frozen, and shared
    twin = kvmix_compile.apply(model, plan=plan())
    before = KVMixCache(twin)
    twin(ids(2, 50), past_key_values=before)
    twin.load_adapter(adapter)
    with pytest.raises(InputError, match=r"q_proj was replaced.*call kvmix_refresh\(\)"):
        text(twin)
    twin.kvmix_refresh()
    assert torch.equal(text(twin), expected)
    with pytest.raises(InputError, match="this cache was made for a model with another plan"):
        twin(ids(2, 1), past_key_values=before)
    assert not [name for name, _ in model.named_modules() if "lora" in name]


def test_peft_wraps_a_compiled_model_and_switches_its_adapter(adapter: Path, expected: Tensor) -> None:
    twin = kvmix_compile.apply(tiny("llama"), plan=plan())
    wrapped = peft.PeftModel.from_pretrained(twin, adapter)
    twin.kvmix_refresh()
    assert torch.equal(text(wrapped), expected)
    with wrapped.disable_adapter():
        with pytest.raises(InputError, match=r"call kvmix_refresh\(\)"):
            text(wrapped)
        twin.kvmix_refresh()
        assert torch.equal(text(wrapped), text(original()))
    twin.kvmix_refresh()
    assert torch.equal(text(wrapped), expected)


def test_a_refresh_that_fails_leaves_the_model_as_it_was() -> None:
    twin = kvmix_compile.apply(original(), plan=plan())
    logits, program = twin(ids(1, 40)).logits, twin.kvmix_program
    with (
        mock.patch.object(compiler, "capture", side_effect=CaptureError("it cannot be captured")),
        pytest.raises(CaptureError),
    ):
        twin.kvmix_refresh()
    assert twin.kvmix_program is program and torch.equal(twin(ids(1, 40)).logits, logits)


def test_hooks_of_a_compiled_model_run_around_its_graph_after_a_refresh() -> None:
    twin, calls = kvmix_compile.apply(original(), plan=plan()), list[int]()
    handle = twin.register_forward_hook(lambda module, given, found: calls.append(1))
    twin.kvmix_refresh()
    twin(ids(1, 9))
    assert calls == [1]
    handle.remove()
    twin(ids(1, 9))
    assert calls == [1]
