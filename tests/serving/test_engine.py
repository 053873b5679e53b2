"""vLLM's engine with a plan: what it writes is what the compiled model writes, whatever its scheduler does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import kvmix_compile
from kvmix_compile.errors import KVMixError
from tests.serving.toy import (
    ROUNDING,
    Toy,
    engine,
    ids,
    largest_difference,
    largest_difference_in_prompt,
    written,
)

# Of which the longest request takes 28, and one of 300 tokens 16.
BLOCKS = 46


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy("llama", tmp_path_factory.mktemp("llama")).save()


@pytest.fixture(scope="module")
def llm(toy: Toy) -> Iterator[Any]:
    """With adapters, and with fewer pages than four requests take."""
    with engine(toy, num_gpu_blocks_override=BLOCKS, enable_lora=True, max_lora_rank=8) as started:
        yield started


def counted(llm: Any, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def test_the_plan_uses_all_that_a_plan_can_say(toy: Toy) -> None:
    sites = toy.twin.kvmix_plan.sites
    assert any(site.key.important_bits for site in sites) and any(site.values_rotated for site in sites)


@pytest.mark.parametrize("tokens", [1, 30, 37, 64, 65, 200])
def test_a_prompt_in_chunks_is_read_as_it_is_stored(toy: Toy, llm: Any, tokens: int) -> None:
    (found,) = written(llm, [ids(tokens, tokens)], prompt_logprobs=0)
    assert tokens == 1 or largest_difference_in_prompt(toy, found) < ROUNDING
    assert largest_difference(toy, found) < ROUNDING


def test_texts_of_several_requests_do_not_mix(toy: Toy, llm: Any) -> None:
    texts = [ids(tokens, tokens + 1) for tokens in (5, 40, 90, 150)]
    together = written(llm, texts)
    for text, found in zip(texts, together, strict=True):
        assert found.prompt_token_ids == text and largest_difference(toy, found) < ROUNDING


def test_what_is_cached_is_found_and_read_as_before(toy: Toy, llm: Any) -> None:
    first, again = (written(llm, [ids(170, 5)])[0] for _ in range(2))
    (longer,) = written(llm, [[*ids(170, 5), *ids(40, 6)]])
    assert (first.num_cached_tokens, again.num_cached_tokens, longer.num_cached_tokens) == (0, 160, 160)
    assert first.outputs[0].token_ids == again.outputs[0].token_ids
    assert max(largest_difference(toy, found) for found in (first, again, longer)) < ROUNDING


def test_several_answers_share_their_prompt(toy: Toy, llm: Any) -> None:
    (found,) = written(llm, [ids(100, 7)], n=3, temperature=1.0)
    assert len({tuple(output.token_ids) for output in found.outputs}) == 3
    assert largest_difference(toy, found) < ROUNDING


def test_requests_give_way_and_go_on(toy: Toy, llm: Any) -> None:
    before = counted(llm, "vllm:num_preemptions")
    found = written(llm, [ids(60, seed) for seed in range(20, 24)], tokens=250)
    assert counted(llm, "vllm:num_preemptions") > before
    assert max(largest_difference(toy, one) for one in found) < ROUNDING


def test_adapters_have_caches_of_their_own(toy: Toy, llm: Any) -> None:
    from vllm.lora.request import LoRARequest

    changed = Toy(toy.name, toy.folder)
    folder = changed.adapted()
    twin = kvmix_compile.apply(changed.model, plan=toy.twin.kvmix_plan, exact_chunks=True)
    (plain,) = written(llm, [ids(120, 8)])
    (adapted,) = written(llm, [ids(120, 8)], lora_request=LoRARequest("toy", 1, str(folder)))
    assert adapted.num_cached_tokens == 0
    assert largest_difference(toy, plain) < ROUNDING and largest_difference(toy, adapted, twin) < ROUNDING
    assert largest_difference(toy, adapted) > 2 * ROUNDING


def test_nothing_is_done_unless_it_is_asked_for(toy: Toy) -> None:
    with engine(toy, additional_config={}) as llm:
        (found,) = written(llm, [ids(150, 9)])
    assert largest_difference(toy, found, twin=toy.model) < 1e-3
    assert largest_difference(toy, found) > 2 * ROUNDING


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mistral"])
def test_models_with_windows(name: str, tmp_path: Path) -> None:
    """Layers of which nothing is ever packed, beside others or alone."""
    other = Toy(name, tmp_path).save()
    with engine(other) as llm:
        found = written(llm, [ids(150, seed) for seed in (1, 2, 1)], prompt_logprobs=0)
        again = written(llm, [ids(150, 1)])
    assert max(largest_difference(other, one) for one in (*found, *again)) < ROUNDING
    assert max(largest_difference_in_prompt(other, one) for one in found) < ROUNDING
    assert again[0].num_cached_tokens > 0


def test_a_model_with_slopes(tmp_path: Path) -> None:
    other = Toy("bloom", tmp_path)
    for block in other.model.transformer.h:
        # vLLM computes this one where BLOOM has its approximation by a hyperbolic tangent.
        block.mlp.gelu_impl = torch.nn.GELU()
    with engine(other.save()) as llm:
        found = written(llm, [ids(200, seed) for seed in (11, 12, 13)], prompt_logprobs=0)
    assert max(largest_difference(other, one) for one in found) < 1e-3


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_window_that_is_packed(name: str, tmp_path: Path) -> None:
    """In all layers, or beside one that sees all: rows of several windows, in chunks, found again and written on."""
    other = Toy(name, tmp_path, {"sliding_window": 90}).save()
    with engine(other, max_num_batched_tokens=150) as llm:
        texts = [ids(tokens, seed) for tokens, seed in ((200, 1), (400, 2), (60, 3), (200, 1))]
        found = written(llm, texts, tokens=60, prompt_logprobs=0)
        again = written(llm, [ids(200, 1), [*ids(400, 2), *ids(30, 4)]])
    assert max(largest_difference(other, one) for one in (*found, *again)) < ROUNDING
    assert max(largest_difference_in_prompt(other, one) for one in found) < ROUNDING
    assert [one.num_cached_tokens for one in again] == [192, 384]


def test_of_a_window_that_is_packed_no_more_is_held_than_it_is(tmp_path: Path) -> None:
    """In fewer blocks than whole texts would take."""
    other = Toy("mistral", tmp_path, {"sliding_window": 90}).save()
    with engine(other, num_gpu_blocks_override=60, max_num_seqs=4, enable_prefix_caching=False) as llm:
        found = written(llm, [ids(300, seed) for seed in range(4)], tokens=150)
        assert counted(llm, "vllm:num_preemptions") == 0
    assert max(largest_difference(other, one) for one in found) < ROUNDING


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"additional_config": {"kvmix": {"plan": "none.json"}}}, "cannot read the plan none.json"),
        ({"num_gpu_blocks_override": 25}, "takes up to 28 blocks"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_start(toy: Toy, options: dict[str, Any], named: str) -> None:
    with pytest.raises(KVMixError, match=named), engine(toy, **options):
        pass


def test_a_plan_of_another_model_is_refused_at_the_start(toy: Toy, tmp_path: Path) -> None:
    other = Toy("gpt2", tmp_path)
    other.twin.kvmix_plan.save(tmp_path / "plan.json")
    config = {"kvmix": {"plan": str(tmp_path / "plan.json")}}
    with pytest.raises(KVMixError, match="another model"), engine(toy, additional_config=config):
        pass
