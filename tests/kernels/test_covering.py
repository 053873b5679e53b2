"""The combinations that the sweep compiles."""

from itertools import combinations, product

from tests.kernels.covering import Combination, covering

OPTIONS = {"size": (1, 2, 3), "colour": ("red", "blue"), "shape": ("round", "square", "flat")}


def fits(chosen: Combination) -> bool:
    return (chosen["size"], chosen["shape"]) != (3, "flat")


def test_every_pair_that_fits_is_in_one_of_few_combinations() -> None:
    found = covering(OPTIONS, fits)
    assert len(found) < 3 * 2 * 3 and all(map(fits, found))
    for one, other in combinations(OPTIONS, 2):
        pairs = {(chosen[one], chosen[other]) for chosen in found}
        impossible = {(3, "flat")} if (one, other) == ("size", "shape") else set()
        assert pairs == set(product(OPTIONS[one], OPTIONS[other])) - impossible


def test_every_choice_alone_is_in_even_fewer() -> None:
    found = covering(OPTIONS, fits, together=1)
    assert len(found) < 6 and all(map(fits, found))
    for name, choices in OPTIONS.items():
        assert {chosen[name] for chosen in found} == set(choices)
