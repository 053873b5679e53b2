"""from_pretrained and save_pretrained: a compressed model is loaded and kept as any model of transformers."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from kvmix_compile import KVMixCache, KVMixConfig, Plan, compiler, pretrained
from kvmix_compile.errors import BudgetError, InputError, KVMixError, PlanError
from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.toy_llama import RECENT, SINKS, ids, original, quantized


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the toy, uncompressed."""
    path = tmp_path_factory.mktemp("original")
    original().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of its twin."""
    path = tmp_path_factory.mktemp("compressed")
    quantized().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(compressed: Path) -> LlamaForCausalLM:
    with mock.patch.object(compiler, "measure", side_effect=AssertionError("it was measured")):
        return AutoModelForCausalLM.from_pretrained(compressed)


def test_a_folder_holds_the_compressed_model(loaded: LlamaForCausalLM) -> None:
    assert loaded.kvmix_plan == quantized().kvmix_plan and isinstance(loaded, LlamaForCausalLM)
    assert torch.equal(loaded(ids(2, 200)).logits, quantized()(ids(2, 200)).logits)
    cache = KVMixCache(loaded)
    text = loaded.generate(ids(2, 90), max_new_tokens=9, do_sample=False, past_key_values=cache)
    assert cache.seen == 98 and torch.equal(text, quantized().generate(ids(2, 90), max_new_tokens=9, do_sample=False))


def test_what_is_saved_says_so_in_its_own_config_alone(compressed: Path) -> None:
    said = json.loads((compressed / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "kvmix" and not said["compile"]
    assert Plan.from_json(json.dumps(said["plan"])) == quantized().kvmix_plan
    for model in (original(), quantized()):
        assert not hasattr(model.config, "quantization_config")


def test_the_loaded_model_is_copied_pickled_and_saved_as_any(loaded: LlamaForCausalLM, tmp_path: Path) -> None:
    expected = loaded(ids(2, 120)).logits
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in (again, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert model.kvmix_plan == loaded.kvmix_plan
        assert torch.equal(model(ids(2, 120)).logits, expected)


def test_weights_that_change_are_followed(compressed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.bfloat16)
    assert model(ids(1, 9)).logits.dtype == torch.bfloat16
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not model(ids(1, 9)).logits.any()
    with pytest.raises(InputError, match="training mode"):
        model.model.train()
        model(ids(1, 9))


def test_with_a_budget_it_is_measured_while_it_is_loaded(folder: Path) -> None:
    asked = KVMixConfig(budget=2.3, calibration=ids(2, 128), sinks=SINKS, recent=RECENT)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked)
    assert model.kvmix_plan == quantized().kvmix_plan
    assert model.config.quantization_config.to_dict()["plan"]["sinks"] == SINKS
    assert model.kvmix_report.verified is not None


def test_with_a_plan_it_is_not(folder: Path, tmp_path: Path) -> None:
    quantized().kvmix_plan.save(tmp_path / "plan.json")
    with mock.patch.object(compiler, "measure", side_effect=AssertionError("it was measured")):
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=KVMixConfig(tmp_path / "plan.json", verify=False)
        )
    assert torch.equal(model(ids(2, 120)).logits, quantized()(ids(2, 120)).logits)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bugdet": 2.3}, PlanError, "KVMixConfig has no bugdet; it takes budget, calibration"),
        ({"budget": 0.5}, BudgetError, "budget=0.5 cannot be met"),
        ({"plan": "nowhere.json"}, PlanError, r"cannot read the plan nowhere\.json"),
        ({"plan": {"format": 1}}, PlanError, "plan"),
    ],
)
def test_what_no_model_can_be_given_is_refused_first(options: dict, error: type[KVMixError], message: str) -> None:
    with pytest.raises(error, match=message):
        KVMixConfig(**options)


def test_what_is_not_compressed_is_not_loaded_in_silence(tmp_path: Path) -> None:
    tiny("mamba").save_pretrained(tmp_path)
    with pytest.raises(KVMixError, match="Mamba"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=KVMixConfig(budget=2.3))


def test_a_plan_of_another_model_is_refused(compressed: Path, tmp_path: Path) -> None:
    tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = AutoConfig.from_pretrained(compressed).quantization_config
    config.save_pretrained(tmp_path)
    with pytest.raises(PlanError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# A config.json that transformers has only read holds a dictionary; one of an older bitsandbytes names no method.
@pytest.mark.parametrize(
    ("said", "method"),
    [
        (BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"load_in_4bit": True}, "of no name"),
    ],
)
def test_weights_that_are_quantized_leave_no_room_in_the_folder(said: object, method: str, tmp_path: Path) -> None:
    twin = copy.copy(quantized())
    twin.config = copy.deepcopy(twin.config)
    twin.config.quantization_config = said
    with pytest.raises(InputError, match=rf"quantized \({method}\): save the original"):
        twin.save_pretrained(tmp_path)
    assert twin.config.quantization_config is said


def test_one_that_was_compiled_is_compiled_again(folder: Path) -> None:
    asked = KVMixConfig(quantized().kvmix_plan, compile=True)
    with (
        mock.patch.object(pretrained, "apply_in_place", side_effect=ZeroDivisionError) as applied,
        pytest.raises(ZeroDivisionError),
    ):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked)
    assert applied.call_args.kwargs == {"compile": True, "verify": True} and asked.to_dict()["compile"]


def test_who_has_not_imported_it_is_told_and_the_code_of_a_trusted_folder_does(compressed: Path) -> None:
    script = f"""
from transformers import AutoModelForCausalLM
for trusted in (False, True):
    model = AutoModelForCausalLM.from_pretrained({str(compressed)!r}, trust_remote_code=trusted)
    print(hasattr(model, "kvmix_plan"), type(model).__name__, model.config.architectures)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    named = "LlamaForCausalLM ['LlamaForCausalLM']"
    assert done.stdout.splitlines() == [f"False {named}", f"True {named}"]
    assert "Unknown quantization type, got kvmix" in done.stderr


def test_a_folder_that_was_loaded_by_its_code_is_saved_with_it(compressed: Path, tmp_path: Path) -> None:
    trusted = AutoModelForCausalLM.from_pretrained(compressed, trust_remote_code=True)
    trusted.save_pretrained(tmp_path / "again")
    for again in (True, False):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=again)
        assert model.kvmix_plan == quantized().kvmix_plan
        assert torch.equal(model(ids(1, 90)).logits, quantized()(ids(1, 90)).logits)


def test_classes_that_are_not_transformers_are_saved_by_their_own_code_alone(tmp_path: Path) -> None:
    class Own(LlamaForCausalLM):
        pass

    model = Own(tiny("llama").config).eval()
    compiler.apply(model, plan=quantized().kvmix_plan).save_pretrained(tmp_path)
    assert not (tmp_path / "kvmix.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
