"""Tasks: puzzles of the lengths that are asked for, answered through the cache, scored by what the answer contains."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvmix_compile.errors import InputError
from kvmix_compile.evaluate.answering import all_ids, answer, check_positions
from kvmix_compile.evaluate.configurations import Configuration
from kvmix_compile.evaluate.puzzles import PUZZLES, Puzzle
from kvmix_compile.progress import progress_bar

LENGTHS = (1000,)
QUESTIONS = 10
# What the original must answer at least of a task's questions for it to tell anything of a cache.
ANSWERABLE = 0.5
# Tokens of an answer for the words around each string that is expected: some models answer in sentences.
SPARE_TOKENS = 16


@dataclass(frozen=True)
class Question:
    """A text and a question about it, int64 `[tokens]` each. length: what was asked for of the text."""

    task: str
    length: int
    text: Tensor
    question: Tensor
    expected: tuple[str, ...]
    answer_tokens: int

    def share(self, written: str) -> float:
        """How much of what is expected an answer contains, from 0 to 1."""
        return sum(string in written for string in self.expected) / len(self.expected)


@dataclass(frozen=True)
class Score:
    """What a configuration scored on the questions of one task and length.

    share: how much of what was expected its answers contain, from 0 to 1, a mean over the questions.
    error: the standard error of that share, were each question right or wrong (binomial).
    """

    configuration: str
    task: str
    length: int
    share: float
    error: float
    answers: tuple[str, ...]


def check_tasks(names: Iterable[str]) -> None:
    """Raise InputError for a name that is none of a task."""
    for name in names:
        if name not in PUZZLES:
            raise InputError(f"there is no task {name}; choose from {', '.join(PUZZLES)}")


def make_questions(
    tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], lengths: Sequence[int], questions: int = QUESTIONS
) -> list[Question]:
    """So many questions of each task at each length, in tokens of text. The same arguments give the same questions.

    Raises InputError for a length that leaves no room to hide anything, or is more than there are words for.
    """
    check_tasks(tasks)
    return [
        _compose(tokenizer, task, PUZZLES[task](random, length), length, random)
        for task in tasks
        for length in lengths
        for random in (Random(f"{task} {length} {number}") for number in range(questions))
    ]


def check_room(configurations: Sequence[Configuration], questions: Sequence[Question]) -> None:
    """Raise InputError where text, question and answer are more than a model has positions for."""
    longest = max((each.text.numel() + each.question.numel() + each.answer_tokens for each in questions), default=0)
    check_positions(configurations, longest, "a task's text, question and answer", "--task-length")


def solve(
    configurations: Sequence[Configuration],
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    progress: bool = False,
) -> list[Score]:
    """What each configuration scores in each task at each length.

    Raises InputError where text, question and answer are more than the model has positions for.
    """
    check_room(configurations, questions)
    answers: dict[tuple[str, str, int], list[tuple[float, str]]] = {}
    with progress_bar("tasks", len(questions) * len(configurations), progress) as advance:
        for each in questions:
            for configuration in configurations:
                written = answer(configuration, tokenizer, each.text, each.question, each.answer_tokens)
                group = answers.setdefault((configuration.name, each.task, each.length), [])
                group.append((each.share(written), written))
                advance()
    return [_score(*group, found) for group, found in answers.items()]


def answerable(scores: Sequence[Score]) -> tuple[list[Score], list[Score]]:
    """The scores where the first configuration, the original, reaches ANSWERABLE; and the original's where it does not,
    which say nothing of a cache.
    """
    original = [score for score in scores if score.configuration == scores[0].configuration]
    failed = [score for score in original if score.share < ANSWERABLE]
    left_out = {(score.task, score.length) for score in failed}
    return [score for score in scores if (score.task, score.length) not in left_out], failed


def _score(configuration: str, task: str, length: int, found: Sequence[tuple[float, str]]) -> Score:
    share = sum(own for own, _ in found) / len(found)
    error = math.sqrt(share * (1 - share) / len(found))
    return Score(configuration, task, length, share, error, tuple(written for _, written in found))


def _compose(tokenizer: PreTrainedTokenizerBase, task: str, puzzle: Puzzle, length: int, random: Random) -> Question:
    """The lines are hidden anywhere, in their order."""
    introduction = all_ids(tokenizer, puzzle.introduction)
    hidden = [all_ids(tokenizer, line + "\n") for line in puzzle.hidden]
    around = length - introduction.numel() - sum(line.numel() for line in hidden)
    if around < 1:
        raise InputError(
            f"a text of {length} tokens is too short for the task {task}: what is hidden takes {length - around}"
        )
    hay = list(_hay(tokenizer, task, puzzle, around))
    places = sorted(random.choices(range(len(hay) + 1), k=len(hidden)))
    for place, line in reversed(list(zip(places, hidden, strict=True))):
        hay.insert(place, line)
    expected = all_ids(tokenizer, " ".join(puzzle.expected))
    return Question(
        task=task,
        length=length,
        text=torch.cat([introduction, *hay]),
        question=all_ids(tokenizer, puzzle.question),
        expected=puzzle.expected,
        answer_tokens=expected.numel() + SPARE_TOKENS * len(puzzle.expected),
    )


def _hay(tokenizer: PreTrainedTokenizerBase, task: str, puzzle: Puzzle, tokens: int) -> Iterator[Tensor]:
    """Whole lines, as many as fit into so many tokens."""
    for line in puzzle.hay:
        ids = all_ids(tokenizer, line + "\n")
        if ids.numel() > tokens:
            return
        tokens -= ids.numel()
        yield ids
    raise InputError(f"the task {task} has no words for so long a text: choose a smaller --task-length")
