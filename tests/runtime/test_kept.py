"""What compiling a model gave is kept for the next process, and used only where it gives this model's logits."""

import copy
import json
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel

import kvmix_compile
from kvmix_compile import KVMixCache, Plan, compiler
from kvmix_compile.errors import VerifyError
from kvmix_compile.models_zoo.plain import hand_written
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.runtime import kept
from tests.helpers.one_capture import applied
from tests.helpers.toy_llama import RECENT, SINKS, ids, quantized, quantized_twin


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is kept; the CPU kernels that there are stay loaded."""
    quantized()
    monkeypatch.setenv("KVMIX_KEEP", "1")
    monkeypatch.setenv("KVMIX_CACHE", str(tmp_path))
    return tmp_path / "starts"


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.exists() else []


def plan(name: str = "llama") -> Plan:
    return quantized_twin(name).kvmix_plan


@cache
def model(name: str) -> PreTrainedModel:
    """Those that all tests share bear marks of having generated, which a digest tells."""
    return tiny(name)


def first(name: str = "llama", **options: object) -> PreTrainedModel:
    """Compiled as in a first process, except that it is captured once in all."""
    return applied(model(name), **{"plan": plan(name), **options})


def second(name: str = "llama", **options: object) -> PreTrainedModel:
    """Compiled as in a second process: nothing is captured."""
    with mock.patch.object(compiler, "capture", side_effect=AssertionError("it was captured")):
        return kvmix_compile.apply(tiny(name), plan=plan(name), **options)


def test_the_second_start_gives_the_same_and_captures_nothing(folder: Path) -> None:
    before = first()
    assert len(files(folder)) == 1
    again = second()
    assert torch.equal(again(ids(2, 300)).logits, before(ids(2, 300)).logits)
    mask = torch.ones(2, 90, dtype=torch.int64)
    mask[0, :5] = 0
    given = {"attention_mask": mask, "max_new_tokens": 50, "do_sample": False}
    assert torch.equal(again.generate(ids(2, 90), **given), before.generate(ids(2, 90), **given))
    assert len(files(folder)) == 1


def test_so_does_that_of_more_layers_though_each_keeps_its_tokens_as_float16() -> None:
    deep = tiny("llama", num_hidden_layers=3)
    made = kvmix_compile.apply(deep, budget=2.3, calibration=ids(1, 64), sinks=SINKS, recent=RECENT).kvmix_plan
    with mock.patch.object(compiler, "capture", side_effect=AssertionError("it was captured")):
        kvmix_compile.apply(tiny("llama", num_hidden_layers=3), plan=made)


def test_what_is_known_of_the_model_is_kept_with_it() -> None:
    before = first()
    again = second()
    for name in ("sites", "verified", "notes", "passes", "own_cache_bytes", "token_bytes"):
        assert getattr(again.kvmix_report, name) == getattr(before.kvmix_report, name)
    assert again.kvmix_plan == plan() and "look up" in again.kvmix_report.seconds
    assert not {"capture", "verify"} & again.kvmix_report.seconds.keys()
    ours, theirs = again.kvmix_program, before.kvmix_program
    assert (ours.format, ours.numbering, ours.steering) == (theirs.format, theirs.numbering, theirs.steering)


def test_a_twin_of_a_second_start_is_as_any(tmp_path: Path) -> None:
    first()
    again = second()
    expected = again(ids(2, 120)).logits
    for other in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(other(ids(2, 120)).logits, expected)
    cache = KVMixCache(again)
    again(ids(1, 100), past_key_values=cache)
    cache.save(tmp_path / "cache")
    held = KVMixCache.load(tmp_path / "cache", again)
    assert torch.equal(again(ids(1, 3), past_key_values=held).logits, again(ids(1, 3), past_key_values=cache).logits)
    again.model.layers[0].self_attn.scaling = 1.0
    with pytest.raises(kvmix_compile.KVMixError, match="scaling was changed"):
        again(ids(1, 9))


@pytest.mark.parametrize("name", ["gpt_oss", "bloom", "deepseek_v3", "qwen3_next"])
def test_other_graphs_are_kept_too(name: str) -> None:
    before = first(name)
    assert torch.equal(second(name)(ids(2, 150)).logits, before(ids(2, 150)).logits)


def test_measuring_a_budget_keeps_what_its_plan_gives() -> None:
    before = first(plan=None, budget=3, calibration=ids(1, 100))
    with mock.patch.object(compiler, "capture", side_effect=AssertionError("it was captured")):
        again = kvmix_compile.apply(tiny("llama"), plan=before.kvmix_plan)
    assert torch.equal(again(ids(2, 300)).logits, before(ids(2, 300)).logits)


def test_another_model_and_another_plan_are_captured(folder: Path) -> None:
    first()
    kvmix_compile.apply(tiny("llama").to(torch.bfloat16), plan=plan())
    first(plan=None, budget=3, calibration=ids(1, 100))
    other = tiny("llama")
    with torch.no_grad():
        other.model.norm.weight[3] = 2
    kvmix_compile.apply(other, plan=plan())
    assert len(files(folder)) == 4


def test_what_does_not_give_the_models_logits_is_not_used(folder: Path) -> None:
    with mock.patch.object(kept, "digest", return_value="of any model"):
        first()
        other = tiny("llama")
        for layer in other.model.layers:
            layer.self_attn.scaling *= 2
        twin = kvmix_compile.apply(other, plan=plan())
    assert "capture" in twin.kvmix_report.seconds and len(files(folder)) == 1
    with torch.no_grad():
        torch.testing.assert_close(twin(ids(1, 20)).logits, other(ids(1, 20)).logits)


def test_what_reads_other_tensors_is_not_used() -> None:
    with mock.patch.object(kept, "digest", return_value="of any model"):
        first()
        twin = kvmix_compile.apply(tiny("llama").double(), plan=plan())
    assert "capture" in twin.kvmix_report.seconds and twin(ids(1, 9)).logits.dtype == torch.float64


def test_what_was_not_verified_is_not_taken_for_verified(folder: Path) -> None:
    first(verify=False)
    second(verify=False)
    verified = first()
    assert verified.kvmix_report.verified is not None and len(files(folder)) == 1
    assert second().kvmix_report.verified == second(verify=False).kvmix_report.verified is not None


def test_a_damaged_file_gives_way_to_a_new_one(folder: Path) -> None:
    first()
    (file,) = files(folder)
    file.write_bytes(file.read_bytes()[:1000])
    first()
    assert files(folder) == [file]
    second()


def test_nothing_is_kept_where_it_is_switched_off_or_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("KVMIX_KEEP", "0")
        first()
    with pytest.raises(VerifyError), mock.patch.object(compiler, "verify_rewrite", side_effect=VerifyError("no")):
        first()
    assert not files(folder)


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVMIX_CACHE", str(tmp_path / "file"))
    twin = first()
    assert torch.equal(twin(ids(1, 90)).logits, quantized()(ids(1, 90)).logits)


def test_the_oldest_files_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    for age in range(5):
        (folder / f"{age}.pt").write_text("")
        os.utime(folder / f"{age}.pt", (100 - age, 100 - age))
    monkeypatch.setattr(kept, "MOST_FILES", 3)
    first()
    left = {file.name for file in files(folder)}
    assert len(left) == 3 and {"0.pt", "1.pt"} < left


def test_a_model_that_is_no_transformers_model_is_kept() -> None:
    before = kvmix_compile.apply(hand_written(), budget=4, calibration=ids(1, 60))
    with mock.patch.object(compiler, "capture", side_effect=AssertionError("it was captured")):
        again = kvmix_compile.apply(hand_written(), plan=before.kvmix_plan)
    assert torch.equal(again(ids(2, 60)), before(ids(2, 60)))


def test_another_process_finds_it_when_a_folder_is_loaded(tmp_path: Path) -> None:
    # Not this process: transformers' registries hold what other tests made, which a digest tells.
    quantized().save_pretrained(tmp_path / "saved")
    program = (
        "import json, sys, kvmix_compile, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(json.dumps(list(model.kvmix_report.seconds)))"
    )
    stages = []
    for seed in ("1", "7"):
        run = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "saved")], env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        stages.append(json.loads(run.stdout))
    assert "capture" in stages[0] and stages[1] == ["look up"]
