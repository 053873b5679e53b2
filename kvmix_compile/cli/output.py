"""Where commands write: what people read, and what programs read."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase, TextStreamer

from kvmix_command.launched import is_first
from kvmix_compile.evaluate import records

STANDARD_OUTPUT = Path("-")


def console_beside(json_file: Path | None) -> Console:
    """For people: standard output, or standard error where that is a program's."""
    return Console(stderr=json_file == STANDARD_OUTPUT)


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """For programs, where they asked for it; of several processes by the first. Raises InputError where the file cannot
    be written.
    """
    if path == STANDARD_OUTPUT:
        print(json.dumps(content, indent=2))
    elif path is not None and is_first():
        records.write_json(path, content)


class Stream(TextStreamer):
    """Hands on what a model writes, word by word, without the prompt and special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """transformers' interface: `text` follows what was handed on before."""
        self.write(text)
