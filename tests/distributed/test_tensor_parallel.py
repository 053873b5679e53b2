"""Models whose weights are spread over two processes: as on one device, in half the cache."""

from typing import Any

import pytest
import torch
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from kvmix_compile.passes.capture.shards import STYLES
from tests.distributed.starting import seen_by_ranks
from tests.distributed.two_ranks import LATENTS, MODELS

# The largest difference of logits between the sums of two processes and those of one.
ROUNDING = 1e-4
# Where a difference of rounding changes one code of a cache in 2 bits.
ONE_CODE = 0.02


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes saw."""
    return seen_by_ranks("two_ranks.py", tmp_path_factory.mktemp("ranks"))


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_give_what_one_device_gives(ranks: list[dict[str, Any]], name: str) -> None:
    alone = ranks[0][name]["alone"]
    for found in (rank[name]["spread"] for rank in ranks):
        assert found["plan"] == alone["plan"]
        assert torch.equal(found["text"], alone["text"])
        assert torch.equal(found["padded"], alone["padded"])
        assert largest(found["logits"][:, :-1], alone["logits"][:, :-1]) < ROUNDING
        assert largest(found["logits"][:, -1], alone["logits"][:, -1]) < ONE_CODE
        assert found["bytes"] * (1 if name == LATENTS else 2) == alone["bytes"]


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_verified_and_the_model_left_as_it_was(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank[name]["verified"] < ROUNDING
        assert rank[name]["untouched"]


def test_a_plan_of_one_device_serves_two_processes(ranks: list[dict[str, Any]]) -> None:
    alone = ranks[0]["llama"]["alone"]
    for rank in ranks:
        found = rank["by the plan of one device"]["spread"]
        assert found["plan"] == alone["plan"]
        assert torch.equal(found["text"], alone["text"])


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_importance_is_that_of_one_device(ranks: list[dict[str, Any]], name: str) -> None:
    alone = ranks[0]["importance"][name]["alone"]
    for found in (rank["importance"][name]["spread"] for rank in ranks):
        assert (found.fingerprint, found.tokens) == (alone.fingerprint, alone.tokens)
        assert found.loss == pytest.approx(alone.loss)
        for site, expected in zip(found.sites, alone.sites, strict=True):
            assert (site.layer, site.shape, site.channel_tiers) == (
                expected.layer,
                expected.shape,
                expected.channel_tiers,
            )
            assert site.key_gradient_norm == pytest.approx(expected.key_gradient_norm, rel=1e-4)
            assert site.value_gradient_norm == pytest.approx(expected.value_gradient_norm, rel=1e-4)
            # A code or two may be others.
            assert site.key_sensitivity == pytest.approx(expected.key_sensitivity, rel=0.01)
            assert site.value_sensitivity == pytest.approx(expected.value_sensitivity, rel=0.01)


def test_all_processes_measure_on_the_same_words_of_the_model(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["on its own words"] == ranks[1]["on its own words"]


def test_a_weight_is_followed_where_it_lies_and_missed_where_it_does_not(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["weights"] for rank in ranks):
        assert found["changed"] and found["follows"] < ROUNDING
        assert "down_proj.weight, of which other processes have parts, was replaced or moved" in found["replaced"]


def test_each_process_goes_on_from_its_own_file(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["caches"]["goes on"] for rank in ranks)


def test_a_file_of_another_process_or_a_damaged_one_is_refused_in_all(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["caches"] for rank in ranks):
        assert "was saved by process 2 of 2, and this is process 1 of 2" in found["swapped"]
        assert "prompt-00002-of-00002.safetensors is no safetensors file, or is damaged" in found["damaged"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("a plan that one lacks", "none.json: No such file"),
        ("a weight of one is NaN", "model.norm.weight has elements that are NaN"),
        ("other budgets", "asked for different plans, budgets or options"),
        ("one compiles", "asked for different plans, budgets or options"),
        ("no compiler in one", "compile=True needs a C++ compiler"),
        ("backend", "which torch.compile's backend 'kvmix' does not take"),
        ("other texts", "were given different token ids"),
        ("copy", "cannot be copied"),
        ("pickle", "cannot be pickled"),
        ("a style", "model.norm is spread over processes in a way that kvmix_compile does not know"),
        ("no style", "o_proj.weight is spread over processes otherwise than by the model's tp_plan"),
        (
            "one head",
            "heads that model.layers.0.self_attn.k_proj.weight projects to cannot be spread evenly over 2 processes",
        ),
        ("odd", "model.embed_tokens.weight, [129, 128], is not spread evenly over 2 processes"),
    ],
)
def test_what_is_refused_is_refused_by_all_in_the_same_words(ranks: list[dict[str, Any]], what: str, said: str) -> None:
    first, second = (rank["refusals"][what] for rank in ranks)
    assert said in first
    assert first == second


def test_the_first_process_writes_what_one_device_writes(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["commands"] for rank in ranks)
    assert first["generate"] == first["generated alone"] != ""
    assert first["perplexities"] == pytest.approx(first["perplexities alone"], rel=1e-3)
    assert "perplexity" in first["eval"]
    assert second["generate"] == second["eval"] == ""


def test_what_is_said_to_the_first_process_all_answer(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["commands"] for rank in ranks)
    assert first["said"] == first["said alone"] != ""
    assert "tokens held" in first["chat"] and "saved to" in first["chat"]
    assert second["chat"] == ""


def test_a_server_is_refused_in_several_processes(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["commands"] for rank in ranks):
        assert "kvmix serve works in one process, and torchrun started 2" in found["serve"]


def test_each_style_computes_what_transformers_does(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["styles"] for rank in ranks):
        assert largest(found["transformers"], found["alone"]) < 1e-5
        assert largest(found["view"], found["alone"]) < 1e-5


def test_every_style_of_tensor_parallelism_is_known_or_refused() -> None:
    unknown = {style for style in ALL_PARALLEL_STYLES if style not in STYLES}
    # Of experts that whole processes have, and of sequences.
    assert unknown == {"sequence_parallel", "ep_dispatch_experts", "grouped_gemm"} & set(ALL_PARALLEL_STYLES)
