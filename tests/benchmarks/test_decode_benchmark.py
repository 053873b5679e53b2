"""The benchmark of decoding: what fails is left out with its reason, and the rest is measured."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvmix_compile
from kvmix_compile.errors import CompilationError
from kvmix_compile.evaluate.configurations import Configuration
from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.benchmark_modules import benchmark
from tests.helpers.toy_llama import ids

decode = benchmark("decode")


class FailingCache(DynamicCache):
    """A cache that runs out of memory at this many tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def update(self, *arguments: Any, **options: Any) -> Any:
        if self.get_seq_length() >= self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34.00 GiB.")
        return super().update(*arguments, **options)


@dataclass(frozen=True)
class Failing(Configuration):
    tokens: int

    def new_cache(self) -> FailingCache:
        return FailingCache(self.tokens)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "DEVICE", torch.device("cpu"))


# At the prompt, while warming up, in the first round, and in the second.
@pytest.mark.parametrize("tokens", [0, 42, 48, 52])
def test_one_that_fails_does_not_stop_the_others(tokens: int) -> None:
    model = tiny("llama")
    contenders = [Configuration("dynamic", model), Failing("failing", model, tokens), Configuration("other", model)]
    rows, left_out = decode.measure(contenders, ids(1, 40), 2, 3)
    assert [row["cache"] for row in rows] == ["dynamic", "other"]
    assert all(row["context"] == 40 and row["tokens_per_second"] > 0 for row in rows)
    assert list(left_out) == ["failing"] and "34.00 GiB" in left_out["failing"]


@pytest.mark.parametrize("tokens", [0, 42, 48, 52])
def test_without_dynamic_the_context_is_left_out(tokens: int) -> None:
    model = tiny("llama")
    contenders = [Failing("dynamic", model, tokens), Configuration("other", model)]
    rows, left_out = decode.measure(contenders, ids(1, 40), 2, 3)
    assert rows == [] and "34.00 GiB" in left_out["dynamic"]
    assert "dynamic failed" in left_out["other"]


def test_the_run_says_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, apply = tiny("llama"), kvmix_compile.apply

    def without_a_compiler(*arguments: Any, compile: bool = False, **options: Any) -> Any:
        if compile:
            raise CompilationError("there is no C++ compiler")
        return apply(*arguments, **options)

    def static_cache(configuration: Configuration) -> None:
        raise RuntimeError("cannot be compiled")

    monkeypatch.setattr(kvmix_compile, "apply", without_a_compiler)
    monkeypatch.setattr(decode.Static, "new_cache", static_cache)
    monkeypatch.setattr(decode, "load", lambda *arguments: (model, ids(1, 80)[0]))
    monkeypatch.setattr(decode, "CALIBRATION_TOKENS", 64)
    monkeypatch.setattr(decode, "BASELINES", ("quanto-4", "none"))
    monkeypatch.setitem(sys.modules, "optimum", None)
    output = tmp_path / "decode.json"
    options = ["--context", "40", "80", "--rounds", "2", "--tokens", "2", "--budget", "16", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["decode", *options])
    decode.main()
    record = json.loads(output.read_text())
    assert [(row["context"], row["cache"]) for row in record["results"]] == [
        (context, cache) for context in (40, 80) for cache in ("dynamic", "kvmix")
    ]
    assert record["seconds_to_compile"] is None
    reasons = {(row["context"], row["cache"]): row["left_out"] for row in record["left_out"]}
    assert list(reasons) == [
        (None, "kvmix-compiled"),
        (None, "quanto-4"),
        (None, "none"),
        (40, "static"),
        (80, "static"),
    ]
    assert "no C++ compiler" in reasons[None, "kvmix-compiled"] and "cannot be compiled" in reasons[80, "static"]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row for row in printed if "left_out" in row] == record["left_out"]
