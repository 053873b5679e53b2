"""Covering arrays: few combinations of options in which every pair of choices occurs (Cohen et al., IEEE TSE, 1997)."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from random import Random
from typing import Any

# Drawn for each combination that is kept: more make the array a little shorter.
DRAWN = 200

Combination = dict[str, Any]
Pair = tuple[str, Any, str, Any]


def covering(options: Mapping[str, Sequence[Any]], fits: Callable[[Combination], bool]) -> list[Combination]:
    """Combinations, one of each option's choices, that fit; every two choices that can go together are in one of them.
    The same arguments give the same combinations.
    """
    random = Random(0)
    names = list(combinations(options, 2))
    missing: dict[Pair, None] = {
        (one, first, other, second): None for one, other in names for first in options[one] for second in options[other]
    }
    found: list[Combination] = []
    while missing:
        one, first, other, second = pair = next(iter(missing))
        drawn = [
            {name: random.choice(choices) for name, choices in options.items()} | {one: first, other: second}
            for _ in range(DRAWN)
        ]
        fitting = [combination for combination in drawn if fits(combination)]
        if not fitting:
            del missing[pair]
            continue
        best = max(fitting, key=lambda combination: sum(each in missing for each in _pairs(combination)))
        found.append(best)
        for each in _pairs(best):
            missing.pop(each, None)
    return found


def named(combination: Combination) -> str:
    """For a test's name."""
    return ", ".join(f"{name} {choice}" for name, choice in combination.items())


def _pairs(combination: Combination) -> list[Pair]:
    return [(one, combination[one], other, combination[other]) for one, other in combinations(combination, 2)]
