"""Draws a conversation with SmolLM2: `python -m benchmarks.chat_picture --plan plan.json [--output FILE]`.

What stands in the picture is what `kvmix chat` writes, answers and figures, while this runs. The plan is what
`kvmix plan smollm2 --output plan.json` saves.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

import kvmix_compile
from kvmix_compile.cli.chat import talk
from kvmix_compile.cli.conversation import Conversation, Style
from kvmix_compile.evaluate.held_out import held_out_english
from kvmix_compile.models_zoo.smollm2 import load_smollm2

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "chat.svg"
WIDTH = 120  # columns
TOKENS = 80  # of an answer at most, so that the picture fits a page
PASSAGES = 6  # of Python's documentation, some 280 tokens each: what the model is told before
LINES = (
    "Hello! Who are you?",
    "What is a list in Python?",
    "/retry",
    "/undo",
    "What is the capital of France?",
    "And of Slovenia?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=IMAGE)
    options = parser.parse_args()
    model, tokenizer = load_smollm2()
    compressed = kvmix_compile.apply(model, plan=options.plan)
    system = "\n\n".join(held_out_english()[-PASSAGES:])
    conversation = Conversation(compressed, tokenizer, Style(max_new_tokens=TOKENS), system)
    console = Console(record=True, width=WIDTH, force_terminal=True)
    talk(conversation, console, typing(LINES, console))
    drawn = console.export_svg(title='kvmix chat smollm2 --plan plan.json --system "$(cat python.txt)"')
    # Rich asks for a font from the network, which an image in a page does not get.
    options.output.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL), encoding="utf-8")


def typing(lines: tuple[str, ...], console: Console) -> Callable[[], str]:
    """A reader that finds each line typed, and shows it as a terminal does."""
    left = iter(lines)

    def read() -> str:
        line = next(left, None)
        console.print("> " if line is None else f"> {line}", style="bold", highlight=False, markup=False)
        if line is None:
            raise EOFError
        return line

    return read


if __name__ == "__main__":
    main()
