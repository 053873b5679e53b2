"""The benchmark of decoding: what fails is left out with its reason, and the rest is measured."""

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvmix_compile
from kvmix_compile.errors import CompilationError, InputError
from kvmix_compile.evaluate.configurations import Compiled, Configuration
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
    (fastest,) = {row["fastest_original"] for row in rows}
    assert next(row for row in rows if row["cache"] == fastest)["speedup_over_fastest"] == 1
    assert rows[0]["speedup_over_dynamic"] == 1


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
    monkeypatch.setattr(decode, "load_unquantized", lambda *arguments: (model, ids(1, 80)[0]))
    monkeypatch.setattr(decode, "CALIBRATION_TOKENS", 64)
    monkeypatch.setattr(decode, "BASELINES", ("quanto-4", "none"))
    for package in ("optimum", "optimum.quanto"):  # whether it was imported before or not
        monkeypatch.setitem(sys.modules, package, None)
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
        (40, "static-compiled"),
        (80, "static"),
        (80, "static-compiled"),
    ]
    assert "no C++ compiler" in reasons[None, "kvmix-compiled"] and "cannot be compiled" in reasons[80, "static"]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row for row in printed if "left_out" in row] == record["left_out"]


def test_only_steps_of_a_static_cache_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compiling(forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def compiled(**arguments: Any) -> Any:
            asked.append(options | {"tokens": arguments["input_ids"].shape[1]})
            return forward(**arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compiling)
    model = tiny("llama")
    contenders = [Configuration("dynamic", model), decode.Static("static-compiled", model, 60, compiled=True)]
    rows, left_out = decode.measure(contenders, ids(1, 40), 2, 2)
    assert not left_out and [row["cache"] for row in rows] == ["dynamic", "static-compiled"]
    assert asked == [{"mode": "default", "fullgraph": True, "tokens": 1}] * (decode.WARM_UP_TOKENS + 4)


def options_of(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    decode.add_model_options(parser)
    return parser.parse_args(arguments)


def test_what_is_not_the_default_is_in_the_name_of_the_results() -> None:
    names = [
        decode.output(options_of(*arguments), "decode").name
        for arguments in (
            [],
            ["--dtype", "bfloat16"],
            ["--dtype", "bfloat16", "--weights", "int8"],
            ["--weights", "int8"],
        )
    ]
    assert names == [
        "decode-cpu.json",
        "decode-cpu-bfloat16.json",
        "decode-cpu-bfloat16-int8.json",
        "decode-cpu-int8.json",
    ]
    assert decode.output(options_of("--output", "mine.json"), "decode") == Path("mine.json")


def test_int8_weights_need_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"needs torchao.*pip install -e '\.\[benchmarks\]'"):
        decode.quantize_weights(tiny("llama"))


def test_int8_weights_are_torchaos_and_only_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    class WeightOnly:
        pass

    class Torchao(ModuleType):
        Int8WeightOnlyConfig = WeightOnly

        def quantize_(self, model: Any, configuration: Any) -> None:
            quantized.append((model, type(configuration)))

    quantized: list[tuple[Any, type]] = []
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, Torchao(name))
    model = tiny("llama")
    monkeypatch.setattr(decode, "load_unquantized", lambda *arguments: (model, ids(1, 80)[0]))
    for weights, expected in (("unquantized", []), ("int8", [(model, WeightOnly)])):
        options = options_of("--weights", weights)
        options.context = [80]
        assert decode.load(options)[0] is model and quantized == expected


def test_a_model_with_int8_weights_decodes() -> None:
    pytest.importorskip("torchao")
    model = copy.deepcopy(tiny("llama"))
    expected = model(ids(1, 40)).logits
    decode.quantize_weights(model)
    assert 0 < (model(ids(1, 40)).logits - expected).abs().max() < 0.1 * expected.abs().max()
    compiled = kvmix_compile.apply(model, budget=16, calibration=ids(1, 80))
    rows, left_out = decode.measure([Configuration("dynamic", model), Compiled("kvmix", compiled)], ids(1, 40), 1, 2)
    assert not left_out and [row["cache"] for row in rows] == ["dynamic", "kvmix"]
