"""English to calibrate on that needs no download: the reference of Python's language, which CPython carries."""

import re
from collections.abc import Iterator
from random import Random

# A passage is long enough to read as a text, and short enough that 4096 tokens span several topics.
PASSAGE_CHARACTERS = 1200
# Shorter paragraphs of the reference are mostly headings, list items and signatures.
SHORTEST_PARAGRAPH = 120
# The share of letters, spaces and punctuation below which a paragraph is code rather than prose.
WORDY = 0.95
SEED = 0


def built_in_english() -> list[str]:
    """About 60 passages of prose, the same for one version of Python, in an order that mixes topics.

    Raises ImportError where Python was stripped of pydoc_data.
    """
    from pydoc_data.topics import topics

    # Some topics include others, so a passage may come twice.
    passages = list(dict.fromkeys(passage for name in sorted(topics) for passage in _passages(topics[name])))
    Random(SEED).shuffle(passages)
    return passages


def _passages(topic: str) -> Iterator[str]:
    passage = ""
    for paragraph in _prose(topic):
        passage += paragraph + "\n\n"
        if len(passage) >= PASSAGE_CHARACTERS:
            yield passage.strip()
            passage = ""


def _prose(topic: str) -> Iterator[str]:
    """The plain paragraphs of a topic in reStructuredText: no headings, lists, code, grammar or markup."""
    for block in re.split(r"\n\s*\n", topic):
        paragraph = re.sub(r'[*"]', "", " ".join(block.split()))
        wordy = sum(character.isalpha() or character in " ,." for character in paragraph) > WORDY * len(paragraph)
        if block[:1].isalpha() and len(paragraph) >= SHORTEST_PARAGRAPH and paragraph.endswith(".") and wordy:
            yield paragraph
