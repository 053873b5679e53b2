"""Made tasks: what is asked for is in the text, once, and is scored by what the answer contains."""

import math
from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
from torch import Tensor

from kvmix_compile.errors import InputError
from kvmix_compile.evaluate import tasks
from kvmix_compile.evaluate.configurations import Configuration
from kvmix_compile.evaluate.puzzles import COMMON_WORDS, PASSAGE_WORDS, PUZZLES
from kvmix_compile.evaluate.tasks import Question, Score, answerable, make_questions, solve
from kvmix_compile.models_zoo.characters import character_tokenizer
from kvmix_compile.models_zoo.tiny import tiny

TOKENIZER = character_tokenizer()
LENGTH = 3000


def made(task: str, questions: int = 3, length: int = LENGTH) -> list[Question]:
    return make_questions(TOKENIZER, [task], [length], questions)


def text_of(question: Question) -> str:
    return TOKENIZER.decode(question.text)


@pytest.mark.parametrize("task", PUZZLES)
def test_a_text_is_as_long_as_asked_for_and_hides_what_is_expected(task: str) -> None:
    for question in made(task):
        assert 0.9 * LENGTH < question.text.numel() <= LENGTH
        assert all(expected in text_of(question) for expected in question.expected)
        assert not any(expected in TOKENIZER.decode(question.question) for expected in question.expected)
        assert question.answer_tokens > len(" ".join(question.expected))


@pytest.mark.parametrize("task", PUZZLES)
def test_every_question_is_another_and_the_same_each_time(task: str) -> None:
    first, again = made(task), made(task)
    assert [text_of(question) for question in first] == [text_of(question) for question in again]
    assert len({question.expected for question in first}) == len({text_of(question) for question in first}) == 3


@pytest.mark.parametrize("task", ["needle", "needle-among-needles", "values", "queries", "records", "json"])
def test_there_is_one_answer(task: str) -> None:
    for question in made(task):
        assert [text_of(question).count(expected) for expected in question.expected] == [1] * len(question.expected)


def test_what_is_hidden_lies_anywhere() -> None:
    (depths,) = [[text_of(one).index(one.expected[0]) / LENGTH for one in made("needle", questions=40)]]
    assert min(depths) < 0.2 and max(depths) > 0.8


def test_four_codes_are_of_one_thing_and_of_four() -> None:
    for task, things in (("values", 1), ("queries", 4)):
        (question,) = made(task, 1)
        lines = [line for line in text_of(question).splitlines() if any(code in line for code in question.expected)]
        names = [line.partition(" is ")[0].removeprefix("The code of ") for line in lines]
        assert len(lines) == 4 and len(set(names)) == things
        assert all(name in TOKENIZER.decode(question.question) for name in names)


def test_codes_are_asked_for_in_the_order_of_their_things() -> None:
    (question,) = made("queries", 1)
    asked, text = TOKENIZER.decode(question.question), text_of(question)
    named = {line.partition("is ")[2].rstrip("."): line for line in text.splitlines() if line.startswith("The code")}
    places = [asked.index(named[code].removeprefix("The code of ").partition(" is")[0]) for code in question.expected]
    assert places == sorted(places)


def test_a_variable_is_set_before_it_is_handed_on() -> None:
    (question,) = made("variables", 1)
    lines = [line for line in text_of(question).splitlines() if line.startswith("VAR ")]
    sources = [line.rpartition(" ")[2] for line in lines]
    assert sources[1:] == list(question.expected[:-1]) and sources[0] in TOKENIZER.decode(question.question)


def test_common_words_are_the_most_common() -> None:
    (question,) = made("common-words", 1)
    counted = Counter(text_of(question).splitlines()[1:])
    assert {word for word, _ in counted.most_common(COMMON_WORDS)} == set(question.expected)
    assert all(count == 1 for line, count in counted.items() if line not in question.expected)


def test_a_record_has_a_near_twin() -> None:
    (question,) = made("records", 1)
    number = TOKENIZER.decode(question.question).rpartition("Record ")[2].partition(":")[0]
    twin = number[:2] + number[3] + number[2] + number[4]
    assert twin != number and f"Record {twin}:" in text_of(question)


def test_a_passage_has_as_many_words_as_it_should() -> None:
    (question,) = made("passage", 1)
    begin = TOKENIZER.decode(question.question).rpartition('"')[2]
    assert len(f"{begin} {question.expected[0]}".split()) == PASSAGE_WORDS
    assert f"{begin} {question.expected[0]}" in text_of(question)


@pytest.mark.parametrize(
    ("length", "task", "message"),
    [(60, "needle", "60 tokens is too short for the task needle"), (200_000, "common-words", "choose a smaller")],
)
def test_impossible_lengths(length: int, task: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(task, 1, length)


def test_an_unknown_task_says_what_there_is() -> None:
    with pytest.raises(InputError, match="no task needles; choose from needle, needle-among-needles, values"):
        made("needles")


# Answers and scores


def test_a_score_is_the_share_that_the_answers_contain(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = make_questions(TOKENIZER, ["values", "needle"], [LENGTH], 4)
    random = Random(0)

    def answer(of: Configuration, tokenizer: object, text: Tensor, asked: Tensor, tokens: int) -> str:
        (question,) = (one for one in questions if one.text is text)
        known = question.expected if of.name == "original" else question.expected[: len(question.expected) // 2]
        return " and ".join(random.sample(known, len(known)))

    monkeypatch.setattr(tasks, "answer", answer)
    model = tiny("llama", max_position_embeddings=2 * LENGTH)
    scores = solve([Configuration("original", model), Configuration("other", model)], TOKENIZER, questions)
    found = {(score.configuration, score.task): (score.share, score.error) for score in scores}
    assert found == {
        ("original", "values"): (1.0, 0.0),
        ("other", "values"): (0.5, pytest.approx(math.sqrt(0.25 / 4))),
        ("original", "needle"): (1.0, 0.0),
        ("other", "needle"): (0.0, 0.0),
    }


def test_a_tiny_model_answers_and_knows_nothing() -> None:
    model = tiny("llama", max_position_embeddings=512)
    (score,) = solve([Configuration("original", model)], TOKENIZER, made("needle", 2, 300))
    assert score.share == 0.0 and len(score.answers) == 2 and all(score.answers)


def test_more_tokens_than_the_model_has_positions_are_refused() -> None:
    with pytest.raises(InputError, match="512 positions: choose a smaller --task-length"):
        solve([Configuration("original", tiny("llama"))], TOKENIZER, made("needle", 1))


def scored(*shares: float) -> Sequence[Score]:
    return [
        Score(name, f"task {number}", 1000, share if name == "original" else 0.0, 0.0, ())
        for number, share in enumerate(shares)
        for name in ("original", "other")
    ]


def test_what_the_original_cannot_do_is_left_out() -> None:
    kept, left_out = answerable(scored(0.9, 0.1, 0.5))
    assert [(score.task, score.configuration) for score in kept] == [
        (f"task {number}", name) for number in (0, 2) for name in ("original", "other")
    ]
    assert [(score.task, score.configuration) for score in left_out] == [("task 1", "original")]
