"""Covering arrays: few combinations of options in which every choice, or every pair of choices, occurs (Cohen et al.,
IEEE TSE, 1997).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from random import Random
from typing import Any

# Drawn for each combination that is kept: more make the array a little shorter.
DRAWN = 200

Combination = dict[str, Any]
Chosen = tuple[tuple[str, Any], ...]


def covering(
    options: Mapping[str, Sequence[Any]], fits: Callable[[Combination], bool], together: int = 2
) -> list[Combination]:
    """Combinations, one of each option's choices, that fit; any `together` choices that can go together are in one of
    them. The same arguments give the same combinations.
    """
    random = Random(0)
    missing: dict[Chosen, None] = {
        tuple(zip(names, choices, strict=True)): None
        for names in combinations(options, together)
        for choices in product(*(options[name] for name in names))
    }
    found: list[Combination] = []
    while missing:
        wanted = next(iter(missing))
        drawn = [
            {name: random.choice(choices) for name, choices in options.items()} | dict(wanted) for _ in range(DRAWN)
        ]
        fitting = [combination for combination in drawn if fits(combination)]
        if not fitting:
            del missing[wanted]
            continue
        best = max(fitting, key=lambda combination: sum(each in missing for each in _chosen(combination, together)))
        found.append(best)
        for each in _chosen(best, together):
            missing.pop(each, None)
    return found


def named(combination: Combination) -> str:
    """For a test's name."""
    return ", ".join(f"{name} {choice}" for name, choice in combination.items())


def _chosen(combination: Combination, together: int) -> list[Chosen]:
    return list(combinations(combination.items(), together))
