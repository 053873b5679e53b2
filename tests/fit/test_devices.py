"""What each of several devices holds."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from kvmix_compile.errors import UnsupportedModelError
from kvmix_compile.fit.caches import unquantized
from kvmix_compile.fit.devices import share
from kvmix_compile.fit.sketch import Sketch, sketch
from kvmix_compile.fit.weightless import weightless
from tests.helpers.one_capture import zoo
from tests.helpers.repository import ROOT

ROWS, TOKENS = 2, 50


@cache
def drawn(name: str) -> tuple[nn.Module, Sketch]:
    model = weightless(zoo(name).config, torch.float32)
    return model, sketch(model)


def weight_bytes(model: nn.Module) -> int:
    return sum(weight.nbytes for weight in model.parameters())


def test_one_device_holds_all() -> None:
    model, of_model = drawn("llama")
    found = share(model, of_model, 1)
    assert (found.weight_bytes, found.cached, found.whole_layers) == (weight_bytes(model), of_model, 0)


def test_two_devices_hold_half_of_what_transformers_divides() -> None:
    model, of_model = drawn("llama")
    found = share(model, of_model, 2)
    norms = sum(weight.nbytes for name, weight in model.named_parameters() if "norm" in name)
    assert found.weight_bytes == (weight_bytes(model) - norms) // 2 + norms
    assert [site.kv_heads for site in found.cached.sites] == [1, 1]
    assert found.whole_layers == 0


def test_each_device_has_a_head_where_there_are_fewer() -> None:
    model, of_model = drawn("llama")
    assert [site.kv_heads for site in share(model, of_model, 8).cached.sites] == [1, 1]


def test_what_all_heads_share_is_on_every_device() -> None:
    model, of_model = drawn("deepseek_v3")
    found = share(model, of_model, 2)
    assert found.cached == of_model
    assert found.whole_layers == len(of_model.sites)


def test_a_model_that_transformers_does_not_divide_is_refused() -> None:
    model = zoo("hand_written")
    with pytest.raises(UnsupportedModelError, match="no plan to divide HandWritten.*--devices 1"):
        share(model, sketch(model), 2)


def test_it_is_what_each_of_two_processes_holds(tmp_path: Path) -> None:
    zoo("llama").save_pretrained(tmp_path)
    program = [Path(__file__).with_name("run_divided.py"), tmp_path, ROWS, TOKENS]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *program]
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, torchrun)), env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    weights, held = map(int, done.stdout.split())
    found = share(*drawn("llama"), 2)
    assert found.weight_bytes == weights
    assert ROWS * unquantized("float32", found.cached).row_bytes(TOKENS) == held
