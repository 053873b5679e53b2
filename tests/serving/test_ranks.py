"""Tensor parallelism: each of two ranks stores its own heads, in the orders of their own channels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from tests.helpers.repository import ROOT
from tests.serving.toy import ROUNDING, Toy

# In seconds: two engines start, one after the other's model is loaded.
TIME_OUT = 600


def test_two_ranks_write_what_one_device_writes(tmp_path: Path) -> None:
    toy = Toy("llama", tmp_path).save()
    orders = [site.channel_order for site in toy.twin.kvmix_plan.sites if site.channel_order]
    assert orders and all(order[0] != order[1] for order in orders)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.serving.two_ranks", tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIME_OUT,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads((tmp_path / "said.json").read_text())
    assert [one["cached"] > 0 for one in found] == [False, False, True, False]
    for one in found:
        own = toy.log_probabilities([*one["prompt"], *one["tokens"]])[-len(one["tokens"]) :]
        assert (torch.tensor(one["log_probabilities"]) - own).abs().max() < ROUNDING
