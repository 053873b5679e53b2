"""What is measured of models that write: ways for a text to come in, drafts, and free writing."""

from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from kvmix_compile.errors import InputError
from kvmix_compile.evaluate.arrival import WAYS, Arrival, arrivals, arriving_text
from kvmix_compile.evaluate.configurations import Compiled, Configuration
from kvmix_compile.evaluate.drafting import QUERIES, draft, repeating_prompt
from kvmix_compile.evaluate.writing import PROMPTS, first_difference, prompt_ids, repetition, write
from kvmix_compile.models_zoo.characters import character_tokenizer
from tests.helpers.one_capture import applied
from tests.helpers.toy_llama import lossless, original, quantized

ORIGINAL = Configuration("original", original())
TOKENIZER = character_tokenizer()


@cache
def exact() -> PreTrainedModel:
    return applied(original(), plan=quantized().kvmix_plan, exact_chunks=True, verify=False)


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Arrival]:
    own = [Compiled("plain", quantized()), Compiled("exact", exact()), Compiled("lossless", lossless())]
    return {(each.configuration, each.way): each for each in arrivals(ORIGINAL, own, arriving_text(TOKENIZER, 250))}


@pytest.mark.parametrize("way", WAYS)
def test_with_exact_chunks_every_way_is_the_same(found: dict[tuple[str, str], Arrival], way: str) -> None:
    exact, decoded = found["exact", way], found["plain", "token by token"]
    assert exact.from_decoded < 1e-6 and exact.same_answer
    assert exact.divergence == pytest.approx(decoded.divergence, rel=1e-3)


def test_without_them_it_is_not_and_a_file_is_the_way_its_text_came(found: dict[tuple[str, str], Arrival]) -> None:
    ways = {way: found["plain", way] for way in WAYS}
    assert ways["in one go"].from_decoded > 1e-3
    assert ways["in one go"].divergence < ways["token by token"].divergence
    for way in ("saved and loaded", "copied"):
        assert ways[way].divergence == ways["in one go"].divergence


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_quantized_comes_as_the_original(found: dict[tuple[str, str], Arrival], way: str) -> None:
    assert found["lossless", way].divergence < 1e-6
    assert found["lossless", way].same_answer


def test_a_text_of_which_nothing_is_quantized_says_nothing() -> None:
    with pytest.raises(InputError, match="of 60 tokens nothing is quantized: choose more than 68 for --ways"):
        arrivals(ORIGINAL, [Compiled("plain", quantized())], arriving_text(TOKENIZER, 60))


def test_there_is_no_more_built_in_text_than_there_is() -> None:
    with pytest.raises(InputError, match="tokens of built-in text: choose a smaller --ways"):
        arriving_text(TOKENIZER, 10**6)


def test_drafts_are_accepted_and_timed() -> None:
    configurations = [ORIGINAL, Compiled("lossless", lossless()), Compiled("exact", exact())]
    results = {each.configuration: each for each in draft(configurations, repeating_prompt(TOKENIZER))}
    assert results["lossless"].tokens_a_step == results["original"].tokens_a_step > 1
    assert all(each.same_text for each in results.values())
    for each in results.values():
        assert list(each.step_seconds) == list(QUERIES)
        assert all(seconds > 0 for seconds in each.step_seconds.values())
    assert not original()._forward_hooks


def test_caches_that_take_nothing_back_are_left_out() -> None:
    class Other(Configuration):
        pass

    assert draft([Other("other", original())], repeating_prompt(TOKENIZER)) == []


def test_writing_is_held_against_the_originals() -> None:
    configurations = [ORIGINAL, Compiled("lossless", lossless()), Compiled("plain", quantized())]
    results = write(configurations, TOKENIZER, 90)
    assert [each.prompt for each in results] == [prompt for prompt in PROMPTS for _ in configurations]
    for each in results:
        assert each.ended or each.tokens == 90
        if each.configuration != "plain":
            assert each.first_difference is None
    assert any(each.first_difference is not None for each in results)


@pytest.mark.parametrize(
    ("written", "expected", "place"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([5], [4], 0),
    ],
)
def test_the_first_difference(written: list[int], expected: list[int], place: int | None) -> None:
    assert first_difference(written, expected) == place


def test_repetition_is_of_eight_tokens_that_came_before() -> None:
    assert repetition(list(range(100))) == 0
    assert repetition([1, 2, 3, 4] * 25) == pytest.approx(0.89)
    assert repetition([*range(40), *range(40)]) == pytest.approx(33 / 80)
    assert repetition([1]) == 0


def test_a_prompt_is_put_as_the_chat_was_trained() -> None:
    plain, chat = character_tokenizer(), character_tokenizer()
    chat.chat_template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}:"
    assert plain.decode(prompt_ids(plain, "Write.")) == "Write."
    assert chat.decode(prompt_ids(chat, "Write.")).endswith("user>Write.:")
    assert prompt_ids(plain, "Write.").dtype == torch.int64
