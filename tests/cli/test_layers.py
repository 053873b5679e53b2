"""Layers side by side: every one has a cell in every row, and its colour goes with its number."""

import pytest

from kvmix_compile.cli.layers import MOST_CELLS, Row, layer_lines, predicted_losses
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.passes.allocate.plan import Plan, SitePlan
from kvmix_compile.passes.allocate.policies import SiteImportance
from kvmix_compile.passes.measure.importance import Importance

SHAPE = SiteShape(kv_heads=2, key_dim=64, value_dim=64)
TWO, FOUR = Precision(2, 32, 4), Precision(4, 32, 4)


def measured(layers: int) -> tuple[Importance, Plan]:
    """Each layer's keys lose a tenth of what those before it lose, and values nothing; keys have 4 bits, values 2."""
    names = [f"layers.{index}" for index in range(layers)]
    sites = tuple(
        SiteImportance(
            name, SHAPE, float("nan"), 1.0,
            key_sensitivity={TWO: 10.0**-index, FOUR: 10.0**-index / 100},
            value_sensitivity={TWO: 0.0},
        )
        for index, name in enumerate(names)
    )  # fmt: skip
    importance = Importance(sites, "f00d", sinks=64, recent=128, tokens=100, loss=1.0)
    plan = Plan(tuple(SitePlan(name, SHAPE, FOUR, TWO) for name in names), "fisher", "f00d", sinks=64, recent=128)
    return importance, plan


def rows_of(layers: int) -> list[Row]:
    ((_, rows),) = layer_lines(*measured(layers))
    return rows


@pytest.mark.parametrize(("layers", "lengths"), [(1, [1]), (32, [32]), (33, [17, 16]), (80, [27, 27, 26])])
def test_lines_are_about_equally_long(layers: int, lengths: list[int]) -> None:
    lines = layer_lines(*measured(layers))
    assert [len(numbers) for numbers, _ in lines] == lengths and max(lengths) <= MOST_CELLS
    assert [number for numbers, _ in lines for number in numbers] == list(range(layers))
    for numbers, rows in lines:
        assert all(len(row.cells) == len(numbers) for row in rows)
        assert rows[0].cells[0].title.startswith(f"layers.{numbers[0]}, keys: ")


def test_colours_go_with_logarithms() -> None:
    keys, values = (row.cells for row in rows_of(6)[:2])
    assert [cell.strength for cell in keys] == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])
    assert {cell.strength for cell in values} == {0}
    assert keys[1].title == "layers.1, keys: 0.1 nats a token"


def test_bits_are_written_into_their_cells() -> None:
    keys, values = (row.cells for row in rows_of(3) if row.kind == "bits")
    assert [(cell.text, cell.strength) for cell in keys] == [("4", 0.5)] * 3
    assert [(cell.text, cell.strength) for cell in values] == [("2", 0.25)] * 3
    assert "groups of 32, 4-bit scales; 4." in keys[0].title


def test_a_precision_that_was_not_measured_has_no_loss() -> None:
    importance, plan = measured(2)
    assert predicted_losses(importance, plan).total == pytest.approx(0.011)
    other = SitePlan("layers.1", SHAPE, Precision(3, 32, 16), TWO)
    unmeasured = Plan((plan.sites[0], other), "uniform", "f00d", sinks=64, recent=128)
    assert predicted_losses(importance, unmeasured).keys == (pytest.approx(0.01), None)
    assert predicted_losses(importance, unmeasured).total is None
    ((_, rows),) = layer_lines(importance, unmeasured)
    assert "loss" not in {row.kind for row in rows}
