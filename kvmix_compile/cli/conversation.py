"""A conversation on one compressed cache, of which each turn reads only what is new. It knows of no terminal."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from kvmix_compile.cli.output import Stream
from kvmix_compile.cli.prompts import Message, conversation_ids
from kvmix_compile.errors import CacheError, InputError
from kvmix_compile.runtime.cache import KVMixCache

# What another answer is drawn at where answers are otherwise the likeliest ones, and would be the same again.
RETRY_TEMPERATURE = 0.7

# What might be said.
SOMETHING: Message = {"role": "user", "content": "?"}


@dataclass(frozen=True)
class Style:
    """How answers are written: with at most so many tokens, each the likeliest one at `temperature` 0, else drawn."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What the model wrote in a turn.

    read: tokens that were read for it. anew: whether these were the whole conversation, of which some had been read.
    written: tokens of it. ended: whether the model ended it, and it was not cut.
    rate: tokens a second, the first one left out, which waits for what is read.
    """

    text: str
    read: int
    anew: bool
    written: int
    ended: bool
    rate: float


@dataclass
class _Read:
    """A cache and the ids that it has read."""

    cache: KVMixCache
    ids: list[int] = field(default_factory=list)


class Conversation:
    """Messages, and a cache that has read them.

    Beside the cache there is a copy of it as it was before the last turn, which `undo` and `retry` go back to. It is
    exact, costs no more than the compressed cache itself, however long the turn was, and serves hybrids, whose caches
    cannot be cropped. The other way, KVMixCache's rollback, holds as many tokens unquantized as a turn may ever have.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, style: Style | None = None, system: str | None = None
    ) -> None:
        self.model, self.tokenizer, self.style = model, tokenizer, style or Style()
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        conversation_ids(tokenizer, [*self.messages, SOMETHING])  # what is refused is so now
        self._now = _Read(KVMixCache(model))
        self._before: _Read | None = None
        self._answers = 0
        self._watch = _Watch()

    @property
    def cache(self) -> KVMixCache:
        """What the model has read, as it is now."""
        return self._now.cache

    def say(self, text: str, write: Callable[[str], None]) -> Answer:
        """The answer to `text`, which `write` is given word by word.

        Raises InputError where the model has no room for it, or cannot read it; the conversation is then as it was.
        """
        return self._answer(
            [*self.messages, {"role": "user", "content": text}], self._now, self.style.temperature, write
        )

    def retry(self, write: Callable[[str], None]) -> Answer:
        """Another answer in the place of the last one, drawn with another seed. Raises InputError without any."""
        self._check_turn()
        temperature = self.style.temperature or RETRY_TEMPERATURE
        return self._answer(self.messages[:-1], self._before or self._now, temperature, write)

    def undo(self) -> None:
        """Take the last turn back. Raises InputError where there is none."""
        self._check_turn()
        self.messages = self.messages[:-2]
        # Of the turns before that one there is no copy: what the cache has read too much, the next turn sees to.
        self._now, self._before = self._before or self._now, None

    def stop(self) -> None:
        """End the answer that is being written, with what there is of it."""
        self._watch.stopped = True

    @property
    def is_stopped(self) -> bool:
        """Whether the answer that is being written, or was last, was ended by `stop`."""
        return self._watch.stopped

    def _check_turn(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise InputError("there is no turn to take back")

    def _answer(
        self, messages: list[Message], start: _Read, temperature: float, write: Callable[[str], None]
    ) -> Answer:
        ids = conversation_ids(self.tokenizer, messages)
        room, had_read = self._room(len(ids)), bool(start.ids)
        before = self._going_on(start, ids)
        kept = len(before.ids)
        if before is not start:
            self._read_on(before, ids[: self._settled(messages, ids)])
        now = copy.deepcopy(before)
        self._watch, self._answers = _Watch(), self._answers + 1
        given = torch.tensor([ids], device=now.cache.format.device)
        with torch.random.fork_rng():
            torch.manual_seed(self.style.seed + self._answers)
            whole = self.model.generate(
                given, attention_mask=torch.ones_like(given), cache=now.cache, max_new_tokens=room,
                streamer=Stream(self.tokenizer, write), stopping_criteria=[self._watch],
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
                **({"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}),
            )[0].tolist()  # fmt: skip
        now.ids = whole[: now.cache.seen]  # without the last token, which is written and not read
        written = whole[len(ids) :]
        text = str(self.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        self.messages = [*messages, {"role": "assistant", "content": text}]
        self._now, self._before = now, before
        return Answer(
            text,
            read=len(ids) - kept,
            anew=had_read and not kept,
            written=len(written),
            ended=len(written) < room and not self._watch.stopped,
            rate=self._watch.rate(),
        )

    def _room(self, tokens: int) -> int:
        """How many tokens an answer may have behind so many. Raises InputError where it is none."""
        longest = self.model.kvmix_program.longest_context
        room = self.style.max_new_tokens if longest is None else min(self.style.max_new_tokens, longest - tokens)
        if room < 1:
            raise InputError(
                f"the conversation would have {tokens} tokens, and the model has {longest} positions: say it in fewer "
                "words, take turns back, or begin a new conversation"
            )
        return room

    def _going_on(self, start: _Read, ids: list[int]) -> _Read:
        """What has been read of `ids`, and nothing else: `start` where it can be, else the copy, else nothing.

        A conversation's ids need not go on from what was read: some templates leave out of earlier answers what the
        model thought, and a drawn answer need not be made of the tokens that its text is read as.
        """
        shared = min(_common(start.ids, ids), len(ids) - 1)
        try:
            start.cache.crop(shared - len(start.ids))  # by 0, mostly
        except CacheError:
            before = self._before
            usable = before is not None and len(before.ids) < len(ids) and before.ids == ids[: len(before.ids)]
            return copy.deepcopy(before) if before is not None and usable else _Read(KVMixCache(self.model))
        start.ids = ids[:shared]
        return start

    def _settled(self, messages: list[Message], ids: list[int]) -> int:
        """How many of a conversation's ids do not depend on what is said last: what the next turns can go back to."""
        return min(_common(ids, conversation_ids(self.tokenizer, [*messages[:-1], SOMETHING])), len(ids) - 1)

    def _read_on(self, read: _Read, ids: list[int]) -> None:
        """Read what of these ids has not been read."""
        if new := ids[len(read.ids) :]:
            self.model(torch.tensor([new], device=read.cache.format.device), cache=read.cache, logits_to_keep=1)
            read.ids = ids


class _Watch(StoppingCriteria):
    """Looks at every token that is written: when it came, and whether the answer is to end with it."""

    def __init__(self) -> None:
        self.stopped = False
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """transformers' interface: whether each row is done."""
        self.times.append(perf_counter())
        return torch.full((len(input_ids),), self.stopped, dtype=torch.bool, device=input_ids.device)

    def rate(self) -> float:
        """Tokens a second behind the first; 0 where it is alone."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else 0.0


def _common(one: list[int], other: list[int]) -> int:
    """How many ids both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
