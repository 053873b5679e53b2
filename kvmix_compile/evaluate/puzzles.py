"""Puzzles: what is hidden in a text, in what, and what is asked about it. Made from a seed, not downloaded.

The kinds are those of RULER (Hsieh et al., arXiv 2404.06654), needles, variables and common words, and three that copy:
fields of one of many records, a passage, a value in JSON. A copy is right as a whole or it is wrong: these are first to
break where a cache loses detail. The wording is this project's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise, product
from random import Random

NOUNS = (
    "anchor", "apple", "arrow", "basket", "beetle", "bell", "bottle", "bridge", "bucket", "button", "candle",
    "canoe", "castle", "chair", "cherry", "clock", "coin", "compass", "copper", "crown", "curtain", "desk",
    "dragon", "drum", "eagle", "engine", "falcon", "feather", "fence", "flute", "forest", "fountain", "garden",
    "glove", "hammer", "harbor", "helmet", "honey", "island", "jacket", "kettle", "ladder", "lantern", "lemon",
    "letter", "lion", "magnet", "marble", "mirror", "mountain", "needle", "ocean", "orchard", "painter", "pencil",
    "piano", "pillow", "planet", "pocket", "rabbit", "ribbon", "river", "saddle", "sailor", "shovel", "silver",
    "spoon", "station", "table", "teacher", "temple", "ticket", "tiger", "tower", "tunnel", "turtle", "valley",
    "violin", "wagon", "walnut", "whistle", "window", "winter",
)  # fmt: skip
ADJECTIVES = (
    "amber", "ancient", "bitter", "blue", "brave", "bright", "calm", "clever", "cold", "crooked", "dark", "dusty",
    "early", "empty", "fast", "frozen", "gentle", "golden", "green", "heavy", "hidden", "hollow", "huge", "humble",
    "jolly", "late", "little", "lonely", "loud", "narrow", "noisy", "pale", "plain", "proud", "purple", "quiet",
    "rapid", "red", "rough", "round", "rusty", "sharp", "shiny", "short", "silent", "simple", "slow", "smooth",
    "soft", "sour", "steep", "striped", "sweet", "tall", "tiny", "warm", "white", "wild",
)  # fmt: skip
# Ordinary sentences in which nothing is hidden.
PROSE = (
    "The market opens early and the baker sets out his bread.",
    "Rain fell on the hills, and by noon the streams were full.",
    "Two children were flying a kite above the old wall.",
    "She closed the book, put on her coat and went for a walk.",
    "The train was late again, but nobody on the platform minded.",
    "He painted the door green because the shop had no other paint.",
    "In the evening the fishermen mended their nets by the fire.",
    "A cat slept on the warm stones until the sun was gone.",
)
HOPS = 4
# Of a passage's words the question has the first ones.
PASSAGE_WORDS, GIVEN_WORDS = 35, 4
COMMON_WORDS = 3
# Tokens of text for each repetition of a common word, which so takes a tenth of any text.
TOKENS_A_REPETITION = 100


@dataclass(frozen=True)
class Puzzle:
    """What is asked about a text.

    introduction: how the text begins.
    hidden: lines to be hidden in it, in this order, among lines of `hay`.
    question: what comes behind the text, up to where the answer begins.
    expected: the strings that a right answer contains.
    """

    introduction: str
    hidden: tuple[str, ...]
    hay: Iterator[str]
    question: str
    expected: tuple[str, ...]


def needle(random: Random, length: int) -> Puzzle:
    """One code in prose."""
    return _codes(random, names=1, codes=1, hay=_prose(random))


def needle_among_needles(random: Random, length: int) -> Puzzle:
    """One code among codes of others."""
    return _codes(random, names=1, codes=1, hay=None)


def values(random: Random, length: int) -> Puzzle:
    """Four codes of one thing."""
    return _codes(random, names=1, codes=4, hay=_prose(random))


def queries(random: Random, length: int) -> Puzzle:
    """The codes of four things."""
    return _codes(random, names=4, codes=1, hay=_prose(random))


def variables(random: Random, length: int) -> Puzzle:
    """A number that is handed on from variable to variable."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    chain = ["".join(random.sample(letters, 3)) for _ in range(HOPS + 1)]
    number = _number(random)
    hidden = [f"VAR {chain[0]} = {number}", *(f"VAR {later} = VAR {earlier}" for earlier, later in pairwise(chain))]
    return Puzzle(
        "Variables are set in the text below. Keep track of their values.\n",
        tuple(hidden),
        _prose(random),
        f"\nQuestion: Which {len(chain)} variables have the value {number}?\n"
        f"Answer: The variables that have the value {number} are",
        tuple(chain),
    )


def common_words(random: Random, length: int) -> Puzzle:
    """The words that a list has most often; every other one is there once."""
    nouns = random.sample(NOUNS, len(NOUNS))
    common, others = nouns[:COMMON_WORDS], nouns[COMMON_WORDS:]
    hidden = common * max(4, length // TOKENS_A_REPETITION)
    random.shuffle(hidden)
    return Puzzle(
        "A list of words. Some of them come many times.\n",
        tuple(hidden),
        iter(_combinations(random, others)),
        f"\nQuestion: Which {COMMON_WORDS} words come most often in the list?\n"
        "Answer: The words that come most often are",
        tuple(common),
    )


def records(random: Random, length: int) -> Puzzle:
    """Two fields of one record, beside one whose number has two digits exchanged."""
    number = _number_of_different_digits(random)
    twin = number[:2] + number[3] + number[2] + number[4]
    room, badge = _number(random), _number(random)
    lines = [_record(number, room, badge), _record(twin, _number(random), _number(random))]
    random.shuffle(lines)
    others = (
        _record(other, _number(random), _number(random)) for other in _numbers(random) if other not in (number, twin)
    )
    return Puzzle(
        "The records of an office follow, one in a line.\n",
        tuple(lines),
        (_record(other, _number(random), _number(random)) for other in others),
        f"\nQuestion: What are room and badge of record {number}?\nAnswer: Record {number}: room",
        (room, badge),
    )


def passage(random: Random, length: int) -> Puzzle:
    """How a passage goes on, word for word."""
    words = [random.choice(pool) for pool in islice(cycle((ADJECTIVES, NOUNS)), PASSAGE_WORDS)]
    number, begin, rest = _number(random), " ".join(words[:GIVEN_WORDS]), " ".join(words[GIVEN_WORDS:])
    return Puzzle(
        "Remember the passage with a number that is hidden in the text below, word for word.\n",
        (f'Passage {number}: "{begin} {rest}"',),
        _prose(random),
        f'\nQuestion: What does passage {number} say?\nAnswer: Passage {number}: "{begin}',
        (rest,),
    )


def json_value(random: Random, length: int) -> Puzzle:
    """The value of a key in JSON; both are random UUIDs."""
    key, value = _identifier(random), _identifier(random)

    def others() -> Iterator[str]:
        while True:
            yield f'  "{_identifier(random)}": "{_identifier(random)}",'

    return Puzzle(
        "JSON:\n{\n",
        (f'  "{key}": "{value}",',),
        others(),
        f'}}\nQuestion: What is the value of "{key}"?\nAnswer: The value of "{key}" is "',
        (value,),
    )


PUZZLES: Mapping[str, Callable[[Random, int], Puzzle]] = {
    "needle": needle,
    "needle-among-needles": needle_among_needles,
    "values": values,
    "queries": queries,
    "variables": variables,
    "common-words": common_words,
    "records": records,
    "passage": passage,
    "json": json_value,
}


def _codes(random: Random, names: int, codes: int, hay: Iterator[str] | None) -> Puzzle:
    """So many things with so many codes each; without hay they are hidden among codes of others."""
    things = _combinations(random, NOUNS)
    asked, others = sorted(things[:names]), things[names:]
    numbers = [_number(random) for _ in range(names * codes)]
    lines = [_code(thing, number) for thing, number in zip(asked * codes, numbers, strict=True)]
    random.shuffle(lines)
    of = _listed([f"the {thing}" for thing in asked])
    what = "code" if len(numbers) == 1 else f"{len(numbers)} codes"
    return Puzzle(
        "Codes are hidden in the text below. Remember them.\n",
        tuple(lines),
        hay or (_code(thing, _number(random)) for thing in others),
        f"\nQuestion: What {'is' if len(numbers) == 1 else 'are'} the {what} of {of}?\n"
        f"Answer: The {what} of {of} {'is' if len(numbers) == 1 else 'are'}",
        tuple(numbers),
    )


def _code(thing: str, number: str) -> str:
    return f"The code of the {thing} is {number}."


def _record(number: str, room: str, badge: str) -> str:
    return f"Record {number}: room {room}, badge {badge}."


def _combinations(random: Random, nouns: Sequence[str]) -> list[str]:
    """Each adjective with each noun, in any order."""
    found = [f"{adjective} {noun}" for adjective, noun in product(ADJECTIVES, nouns)]
    random.shuffle(found)
    return found


def _prose(random: Random) -> Iterator[str]:
    while True:
        yield random.choice(PROSE)


def _number(random: Random) -> str:
    return str(random.randrange(10_000, 100_000))


def _number_of_different_digits(random: Random) -> str:
    return "".join(random.sample("123456789", 5))


def _numbers(random: Random) -> Iterator[str]:
    while True:
        yield _number(random)


def _identifier(random: Random) -> str:
    digits = f"{random.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _listed(things: list[str]) -> str:
    return things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
