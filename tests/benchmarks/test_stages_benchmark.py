"""The benchmark of stages: what each takes is its own, and that of what it lies in."""

import sys

import pytest
import torch

from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.benchmark_modules import benchmark
from tests.helpers.toy_llama import ids

stages = benchmark("stages")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")

MEGABYTES = 64


def hold(megabytes: int) -> None:
    torch.ones(megabytes * 2**20, dtype=torch.uint8)


def test_a_peak_is_its_stages_and_that_of_the_one_around_it() -> None:
    meter = stages.Meter(torch.device("cpu"))
    with meter.stage("whole"):
        with meter.stage("large"):
            hold(MEGABYTES)
        with meter.stage("small"):
            hold(MEGABYTES // 16)
    peaks = {name: peak / 2**20 for name, peak in meter.peaks.items()}
    assert peaks["large"] > 0.9 * MEGABYTES and peaks["whole"] >= peaks["large"]
    assert peaks["small"] < MEGABYTES / 4
    assert meter.seconds["whole"] >= meter.seconds["large"] + meter.seconds["small"]


def test_every_stage_of_apply_is_seen() -> None:
    meter = stages.metered_apply(tiny("llama", num_hidden_layers=1), ids(1, 300), torch.device("cpu"))
    assert {"capture", "find sites", "verify", "measure", "allocate", "rewrite", "apply"} <= meter.peaks.keys()
    assert meter.seconds["apply"] >= sum(meter.seconds[stage] for stage in ("capture", "verify", "measure"))


def test_the_table_has_a_column_for_each_model() -> None:
    results = [
        {"shape": shape, "layers": 2, "weights": 10**9, "seconds": {"verify": 1.25}, "peak_bytes": {"verify": 3e6}}
        for shape in ("1b", "3b")
    ]
    assert stages.table(results).splitlines() == [
        "| stage | 1b, 2 layers | 3b, 2 layers |",
        "|---|---|---|",
        "| (weights) | 1000 MB | 1000 MB |",
        "| verify | 1.2 s, 3 MB | 1.2 s, 3 MB |",
    ]
