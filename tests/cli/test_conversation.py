"""A conversation: what each turn reads, what it writes, and what taking back leaves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvmix_compile.cli.conversation import RETRY_TEMPERATURE, Conversation, Style
from kvmix_compile.cli.prompts import conversation_ids
from kvmix_compile.errors import InputError
from kvmix_compile.models_zoo.characters import character_tokenizer
from kvmix_compile.runtime.cache import KVMixCache
from tests.helpers.toy_llama import lossless, lossless_twin, quantized, quantized_twin

PLAIN = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"
# As templates do of models that think before they answer: of an earlier answer only its end is kept.
REWRITING = PLAIN.replace(
    "{{ message.content }}", "{{ message.content[-3:] if message.role == 'assistant' else message.content }}"
)
SAID = "the quick brown fox jumps over the lazy dog"
STYLE = Style(max_new_tokens=12)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = character_tokenizer()
    made.chat_template = PLAIN
    return made


def ignored(text: str) -> None:
    """A writer that writes nothing."""


def held(cache: KVMixCache) -> dict[str, Tensor]:
    """Copies of all that a cache holds."""
    states = {f"{site}.{name}": kept for site, state in enumerate(cache.states) for name, kept in vars(state).items()}
    carried = {f"carried.{place}": kept for place, kept in enumerate(sum(cache.carried, ()))}
    return {name: kept.clone() for name, kept in (states | carried | {"lengths": cache.lengths}).items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(kept, other[name]) for name, kept in one.items())


def from_the_whole(conversation: Conversation, **options: Any) -> str:
    """What `generate` writes in the place of the last answer, from everything said before it and an empty cache."""
    ids = torch.tensor([conversation_ids(conversation.tokenizer, conversation.messages[:-1])])
    options = {"do_sample": False, "max_new_tokens": conversation.style.max_new_tokens} | options
    written = conversation.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return conversation.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("template", [PLAIN, REWRITING, None], ids=["extended", "rewritten", "none"])
@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_a_turn_is_what_generate_writes_from_the_whole(
    name: str, template: str | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = template
    conversation = Conversation(lossless_twin(name), tokenizer, STYLE)
    for turn in range(3):
        pieces: list[str] = []
        answer = conversation.say(f"{turn}: {SAID}", pieces.append)
        assert answer.text == "".join(pieces) == conversation.messages[-1]["content"] == from_the_whole(conversation)
        assert answer.written > 0


def test_a_turn_reads_what_is_new_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation(quantized(), tokenizer, STYLE)
    first = conversation.say(SAID, ignored)
    assert first.read == len(conversation_ids(tokenizer, conversation.messages[:-1]))
    before = conversation.cache.seen
    second = conversation.say(SAID, ignored)
    whole = len(conversation_ids(tokenizer, conversation.messages[:-1]))
    assert second.read < first.read + STYLE.max_new_tokens and not second.anew
    assert whole - before <= second.read < whole - before + STYLE.max_new_tokens


def test_where_a_template_rewrites_answers_the_last_turn_is_read_again_and_no_earlier_one(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = REWRITING
    conversation = Conversation(lossless_twin("lfm2"), tokenizer, STYLE)  # whose cache cannot be cropped
    for turn in range(4):
        answer = conversation.say(f"{turn}: {SAID}", ignored)
        assert answer.anew == (turn == 1)  # of the first turn there is nothing to go back to
    assert answer.read < len(conversation_ids(tokenizer, conversation.messages[-4:]))


def said_twice(name: str, tokenizer: PreTrainedTokenizerFast) -> tuple[Conversation, dict[str, Tensor]]:
    """A conversation of two turns, and what its cache held between them."""
    conversation = Conversation(quantized_twin(name), tokenizer, STYLE)
    conversation.say(SAID, ignored)
    between = held(conversation.cache)
    conversation.say(SAID * 3, ignored)
    return conversation, between


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_undo_leaves_the_cache_as_it_was_before_the_turn(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    conversation, between = said_twice(name, tokenizer)
    after, said = held(conversation.cache), conversation.messages
    conversation.undo()
    assert equal(held(conversation.cache), between)
    assert conversation.messages == said[:2]
    conversation.say(SAID * 3, ignored)
    assert equal(held(conversation.cache), after) and conversation.messages == said


def test_further_undone_turns_are_read_anew_and_it_is_said(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation(lossless_twin("lfm2"), tokenizer, STYLE)
    conversation.say(SAID, ignored)
    conversation.say(SAID, ignored)
    conversation.undo()
    conversation.undo()
    assert conversation.messages == []
    answer = conversation.say("Once more", ignored)
    assert answer.anew and answer.text == from_the_whole(conversation)
    conversation.undo()
    with pytest.raises(InputError, match="there is no turn to take back"):
        conversation.undo()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_another_answer_differs_in_its_seed_alone(temperature: float, tokenizer: PreTrainedTokenizerFast) -> None:
    style = Style(max_new_tokens=12, temperature=temperature, seed=5)
    conversation = Conversation(lossless(), tokenizer, style)
    conversation.say(SAID, ignored)
    answers = []
    for seed in (style.seed + 2, style.seed + 3):
        answers.append(conversation.retry(ignored).text)
        torch.manual_seed(seed)
        drawn = from_the_whole(conversation, do_sample=True, temperature=temperature or RETRY_TEMPERATURE)
        assert answers[-1] == drawn
        assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert answers[0] != answers[1]


def test_what_is_drawn_leaves_the_random_state_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.get_rng_state()
    Conversation(quantized(), tokenizer, Style(max_new_tokens=4, temperature=1.0)).say(SAID, ignored)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_answer_can_be_stopped(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation(lossless(), tokenizer, Style(max_new_tokens=200))
    answer = conversation.say(SAID, stopping(conversation))
    assert conversation.is_stopped and not answer.ended and answer.written < 200
    assert conversation.say(SAID, ignored).text == from_the_whole(conversation)


def stopping(conversation: Conversation) -> Callable[[str], None]:
    """A writer that stops the answer with its first word."""
    return lambda text: conversation.stop()


def test_a_conversation_that_is_too_long_is_refused_and_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation(quantized(), tokenizer, STYLE)
    conversation.say(SAID, ignored)
    before, messages = held(conversation.cache), conversation.messages
    with pytest.raises(InputError, match="the model has 512 positions: say it in fewer words"):
        conversation.say("x" * 500, ignored)
    assert equal(held(conversation.cache), before) and conversation.messages == messages


def test_what_fails_in_a_turn_leaves_the_conversation_as_it_was(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation, _ = said_twice("llama", tokenizer)
    before, messages = held(conversation.cache), conversation.messages

    def interrupted(text: str) -> None:
        raise KeyboardInterrupt

    for ask in (conversation.retry, lambda write: conversation.say(SAID, write)):
        with pytest.raises(KeyboardInterrupt):
            ask(interrupted)
        assert equal(held(conversation.cache), before) and conversation.messages == messages


def test_an_answer_ends_where_the_model_has_no_more_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation(lossless(), tokenizer, Style(max_new_tokens=100))
    answer = conversation.say("x" * 480, ignored)
    assert answer.written <= 512 - answer.read


def test_a_system_message_goes_first(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation(quantized(), tokenizer, STYLE, system="Be brief.")
    with pytest.raises(InputError, match="there is no turn"):
        conversation.undo()
    conversation.say(SAID, ignored)
    assert tokenizer.decode(conversation_ids(tokenizer, conversation.messages)).startswith("<system>Be brief.\n<user>")


def test_what_a_tokenizer_cannot_render_is_refused_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(InputError, match="the model's chat template refuses this conversation: System role not"):
        Conversation(quantized(), tokenizer, system="Be brief.")
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template, so it takes no --system"):
        Conversation(quantized(), tokenizer, system="Be brief.")


def test_without_a_template_the_texts_are_read_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    messages = [
        {"role": role, "content": text} for role, text in (("user", "one"), ("assistant", " two"), ("user", "3"))
    ]
    assert tokenizer.decode(conversation_ids(tokenizer, messages)) == "one two\n3"
