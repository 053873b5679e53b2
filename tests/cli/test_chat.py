"""`kvmix chat`: what stands in the terminal, line by line."""

import io
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvmix_command.main import app
from kvmix_compile.cli.chat import HELP, Words, talk
from kvmix_compile.cli.conversation import Conversation, Style
from kvmix_compile.models_zoo.characters import character_tokenizer
from tests.helpers.toy_llama import quantized

SAID = "the quick brown fox jumps over the lazy dog"


@pytest.fixture
def conversation() -> Conversation:
    return Conversation(quantized(), character_tokenizer(), Style(max_new_tokens=8))


def shown(conversation: Conversation, *lines: str | BaseException) -> str:
    """What a terminal shows where a user types these lines, or presses Ctrl-C, and then Ctrl-D."""
    typed: Iterator[str | BaseException] = iter((*lines, EOFError()))

    def read() -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    console = Console(width=200, file=io.StringIO(), record=True)
    talk(conversation, console, read)
    assert next(typed, None) is None, "it ended too early"
    return console.export_text()


def test_it_answers_and_says_what_that_took(conversation: Conversation) -> None:
    text = shown(conversation, SAID, "", "   ")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    words = re.findall("[!-~]+", conversation.messages[1]["content"])
    assert words and all(word in text for word in words)
    assert f"{conversation.cache.seen} tokens held in " in text and "tokens a second" in text


def test_words_are_not_broken_at_the_edge_of_a_terminal(conversation: Conversation) -> None:
    text = "one two three\n\nfour, longerthanthatline six"
    for terminal, expected in ((True, "one two\nthree\n\nfour,\nlongerthanthatline\nsix\n"), (False, text + "\n")):
        console = Console(width=8, file=io.StringIO(), record=True, force_terminal=terminal)
        words = Words(console)
        for piece in re.findall(r"\S*\s*", text):  # as a streamer hands them on
            words(piece)
        console.out()
        shown = console.export_text()
        assert [line.rstrip() for line in shown.splitlines()] == expected.splitlines()


def test_commands_do_what_help_says(conversation: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "said.json"
    text = shown(conversation, "/help", SAID, "again", "/retry", "/undo", f"/save {path}", "/undo", "/undo", "/quitt")
    assert HELP in text
    assert f"taken back: the last thing said is '{SAID}'" in text
    assert f"saved to {path}" in text
    assert [message["content"] for message in json.loads(path.read_text())][0] == SAID
    assert "taken back: nothing is said" in text
    assert "error: there is no turn to take back" in text
    assert "error: there is no /quitt: /help lists what you can do" in text
    assert conversation.messages == []


def test_it_cannot_save_everywhere(conversation: Conversation, tmp_path: Path) -> None:
    text = shown(conversation, "/save", f"/save {tmp_path}/no/folder.json")
    assert "error: give a file to save to" in text and "error: cannot write" in text


def test_what_only_begins_with_a_slash_is_said(conversation: Conversation) -> None:
    assert "error" not in shown(conversation, "/etc/passwd holds what?")
    assert conversation.messages[0]["content"] == "/etc/passwd holds what?"


def interrupting(conversation: Conversation, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Has Ctrl-C pressed so many times whenever an answer begins."""
    generate = conversation.model.generate

    def interrupted(*arguments: Any, **options: Any) -> Any:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return generate(*arguments, **options)

    monkeypatch.setattr(conversation.model, "generate", interrupted)


def test_ctrl_c_ends_an_answer_and_not_the_chat(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupting(conversation, monkeypatch, times=1)
    assert "; stopped" in shown(conversation, KeyboardInterrupt(), SAID)
    assert len(conversation.messages) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_takes_the_turn_back(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupting(conversation, monkeypatch, times=2)
    assert "this turn is taken back" in shown(conversation, SAID)
    assert conversation.messages == [] and conversation.cache.seen == 0


def test_the_command_talks_with_what_was_saved_compressed(tmp_path: Path) -> None:
    quantized().save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    arguments = ["chat", str(tmp_path), "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, arguments, input=f"{SAID}\n/undo\n")
    assert done.exit_code == 0, done.output
    assert "tokens held in" in done.stdout and "taken back: nothing is said" in done.stdout
    refused = CliRunner().invoke(app, [*arguments, "--system", "Be brief."])
    assert refused.exit_code == 1 and "no chat template" in refused.stderr
