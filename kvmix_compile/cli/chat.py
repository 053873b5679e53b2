"""`kvmix chat`: a conversation in the terminal."""

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from transformers.utils import logging

from kvmix_command.launched import is_first, processes
from kvmix_compile.cli.conversation import Answer, Conversation, Style
from kvmix_compile.cli.hearing import heard_by_all
from kvmix_compile.cli.loading import load_model
from kvmix_compile.cli.measuring import compressed
from kvmix_compile.cli.tables import CacheSize
from kvmix_compile.config import Config
from kvmix_compile.errors import InputError, KVMixError

HELP = """\
/retry      take the last answer back, and write another one
/undo       take the last turn back
/save FILE  write the conversation as JSON
/help       this
/quit       end, as Ctrl-D does; Ctrl-C stops an answer"""


def chat(
    name: str,
    system: str | None,
    plan: Path | None,
    budget: float | None,
    storage_budget: float | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """Talk until /quit or the end of standard input."""
    asked = Config(plan=plan, budget=budget, storage_budget=storage_budget)
    asked.checked()
    # Between the lines of a conversation, what transformers thinks of settings is out of place.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = load_model(name)
    tokenizer = loaded.require_tokenizer()
    model = compressed(loaded, asked)
    conversation = Conversation(model, tokenizer, Style(max_new_tokens, temperature, seed), system)
    if processes() > 1:
        # Ctrl-C is torchrun's, which ends all processes and waits until they have ended.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    talk(conversation, Console(), heard_by_all(read_line))


def read_line() -> str:
    """A line of the user's, with the editing that readline gives where there is a terminal."""
    with suppress(ImportError):
        import readline  # noqa: F401
    return input("> " if sys.stdin.isatty() else "")


def talk(conversation: Conversation, console: Console, read: Callable[[], str]) -> None:
    """Answer each line that `read` gives, and do what it says where it begins with a slash; until EOFError or /quit."""
    plan = conversation.cache.plan
    bits = f"{plan.code_bits:.2f} code bits, {plan.storage_bits:.2f} stored"
    _note(console, f"KV cache at {bits}. /help lists what you can do, Ctrl-D ends.\n")
    while True:
        try:
            line = read().strip()
        except KeyboardInterrupt:
            _note(console, "\nCtrl-D ends the chat, /help lists what you can do")
            continue
        except EOFError:
            console.print()
            return
        if line == "/quit":
            return
        try:
            if line:
                _do(line, conversation, console)
        except KVMixError as error:
            _note(console, f"error: {error}\n", "red")
        except KeyboardInterrupt:  # for the second time in one answer
            _note(console, "\nthis turn is taken back")


def _do(line: str, conversation: Conversation, console: Console) -> None:
    command, _, argument = line.partition(" ")
    write = Words(console)
    if command == "/help":
        _note(console, f"{HELP}\n")
    elif command == "/undo":
        conversation.undo()
        said = next((each["content"] for each in conversation.messages[-2:-1]), None)
        after = "nothing is said" if said is None else f"the last thing said is {said!r}"
        _note(console, f"taken back: {after}\n")
    elif command == "/save":
        _save(argument.strip(), conversation)
        _note(console, f"saved to {argument.strip()}\n")
    elif command == "/retry":
        with _interruptible(conversation):
            answer = conversation.retry(write)
        _show(answer, conversation, console)
    elif re.fullmatch("/[a-z]+", command):
        raise InputError(f"there is no {command}: /help lists what you can do")
    else:
        with _interruptible(conversation):
            answer = conversation.say(line, write)
        _show(answer, conversation, console)


class Words:
    """Writes what a model writes; on a terminal, a word that would cross the edge goes to the next line."""

    def __init__(self, console: Console) -> None:
        self.console, self.column = console, 0

    def __call__(self, text: str) -> None:
        for piece in re.findall(r"\n|[^\S\n]+|\S+", text):
            if piece == "\n":
                self.column = 0
            elif self.console.is_terminal and self.column + cell_len(piece) > self.console.width:
                self.console.out()
                self.column = 0
                if piece.isspace():
                    continue
            self.column += cell_len(piece.strip("\n"))
            self.console.out(piece, end="", highlight=False)


def _note(console: Console, text: str, style: str = "dim") -> None:
    """A line that the model did not write."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=not console.is_terminal)


@contextmanager
def _interruptible(conversation: Conversation) -> Iterator[None]:
    """Ctrl-C ends an answer behind the token that is being written; a second one ends it where it is. Not where it ends
    the process.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        yield
        return

    def interrupt(*_: object) -> None:
        if conversation.is_stopped:
            raise KeyboardInterrupt
        conversation.stop()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _show(answer: Answer, conversation: Conversation, console: Console) -> None:
    """Below an answer, in one line, what it took."""
    size = CacheSize.of(conversation.cache)
    said = [f"{size.tokens} tokens held in {size.beside_16_bits}"]
    if answer.rate:
        said.append(f"{answer.rate:.1f} tokens a second")
    if answer.anew:
        said.append(f"the conversation was read anew ({answer.read} tokens)")
    if not answer.ended:
        said.append("stopped" if conversation.is_stopped else f"cut at {answer.written} tokens")
    console.print()
    _note(console, "; ".join(said) + "\n")


def _save(name: str, conversation: Conversation) -> None:
    if not name:
        raise InputError("give a file to save to: /save FILE")
    if not is_first():
        return
    try:
        Path(name).expanduser().write_text(json.dumps(conversation.messages, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {name}: {error.strerror or error}") from error
