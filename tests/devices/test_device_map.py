"""Models whose layers are on two devices: as on one, and what they store lies beside the layer that made it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvmix_compile.kernels.cpu.library import COMPILERS
from tests.devices.two_devices import DEVICES, MODELS
from tests.helpers.repository import ROOT

pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler")

# In seconds: a few times what it takes on two slow cores.
TIME_OUT = 480

# The largest difference of logits that the order of sums makes.
ROUNDING = 1e-4
# Where a difference of rounding changes one code of a cache in 2 bits.
ONE_CODE = 0.02


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen on two devices, in a process of its own."""
    folder = tmp_path_factory.mktemp("devices")
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("two_devices.py"), folder],
        env=os.environ | {"PYTHONPATH": str(ROOT), "KVMIX_KEEP": "1", "KVMIX_CACHE": str(folder / "kept")},
        capture_output=True,
        text=True,
        timeout=TIME_OUT,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return torch.load(folder / "found.pt", weights_only=False)


def largest(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The largest difference of two tensors."""
    one, other = pair
    return (one - other).abs().max().item()


@pytest.mark.parametrize("name", MODELS)
def test_two_devices_give_what_one_gives(found: dict[str, Any], name: str) -> None:
    alone, spread = found[name]["alone"], found[name]["spread"]
    assert spread["plan"] == alone["plan"]
    assert spread["bytes"] == alone["bytes"]
    assert spread["goes on from a file"]
    for text in ("text", "padded", "beams", "sampled"):
        assert torch.equal(spread[text], alone[text])
    assert largest((spread["logits"][:, :-1], alone["logits"][:, :-1])) < ROUNDING
    assert largest((spread["logits"][:, -1], alone["logits"][:, -1])) < ONE_CODE


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_stores_on_its_own_device(found: dict[str, Any], name: str) -> None:
    devices = found[name]["spread"]["devices"]
    assert devices == [DEVICES[0]] + [DEVICES[1]] * (len(devices) - 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_verified_and_the_model_left_as_it_was(found: dict[str, Any], name: str) -> None:
    assert found[name]["verified"] < ROUNDING
    assert found[name]["untouched"]


def test_logits_are_where_the_token_ids_were(found: dict[str, Any]) -> None:
    assert {found[name]["where logits are"] for name in MODELS} == {DEVICES[0]}
    assert found["llama"]["spread"]["logits are on"] == "cpu"  # as the ids that it was given


def test_what_goes_to_another_device_goes_there_once(found: dict[str, Any]) -> None:
    # Hidden states (a sum), both rotary tables (products) and logits (a linear map), whatever the number of layers.
    assert sorted(found["moves"]) == ["add", "lengths", "linear", "logit_positions", "mul", "mul", "starts"]


@pytest.mark.parametrize("way", ["gathered", "spread", "same"])
def test_a_saved_cache_goes_on_wherever_layers_are(found: dict[str, Any], way: str) -> None:
    assert largest(found["caches"][way]) < ONE_CODE


def test_a_cache_is_cropped_and_its_rows_are_chosen(found: dict[str, Any]) -> None:
    assert largest(found["caches"]["cropped"]) < ONE_CODE


def test_embeddings_are_read_by_the_models_own_forward(found: dict[str, Any]) -> None:
    assert largest((found["own forward"]["spread"], found["own forward"]["alone"])) < ONE_CODE


def test_a_start_is_kept_for_a_device_map(found: dict[str, Any]) -> None:
    assert "capture" not in found["second start"]
    assert "capture" in found["other map"]["seconds"]


def test_a_plan_that_was_made_with_another_device_map_serves(found: dict[str, Any]) -> None:
    assert torch.equal(found["other map"]["text"], found["llama"]["alone"]["text"])


@pytest.mark.parametrize("way", ["drafts", "of the copy"])
def test_drafts_and_copies_write_the_same_text(found: dict[str, Any], way: str) -> None:
    assert torch.equal(found[way], found["text"])


@pytest.mark.parametrize("way", ["loaded", "again"])
def test_transformers_loads_a_compressed_model_onto_two_devices(found: dict[str, Any], way: str) -> None:
    assert torch.equal(found["folders"][way], found["text"].cpu())


def test_a_compiled_model_is_captured_anew(found: dict[str, Any]) -> None:
    refresh = found["refresh"]
    assert "variance_epsilon was changed" in refresh["stale"]
    assert largest((refresh["after"], refresh["expected"])) < ROUNDING
    assert largest((refresh["after"], refresh["before"])) > ONE_CODE


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("a layer is split", "parts of one layer on different ones: give each layer one device"),
        ("values on another device", "are made on several devices (toy:0, toy:1)"),
        ("no device_map", "is spread over cpu, toy:1 without a device_map"),
        ("compile", "Inductor does not compile such a graph yet: call kvmix_compile.apply without compile=True"),
        ("backend", "which torch.compile's backend 'kvmix' does not take: call kvmix_compile.apply(model)"),
        ("pickle", "whose weights are on several devices cannot be pickled: keep its plan"),
        ("offloaded", "is not in memory but offloaded, or on the meta device: load all of the model onto one device"),
        ("moved", "weights of the model were moved from one device to another after it was compiled"),
    ],
)
def test_what_cannot_be_is_refused(found: dict[str, Any], what: str, said: str) -> None:
    assert said in found["refusals"][what]
