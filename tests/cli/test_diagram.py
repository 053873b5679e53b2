"""Where a diagram's ticks and points lie."""

import pytest

from kvmix_compile.cli.diagram import MOST_TICKS, Axis, Diagram, Line, Point


def test_ticks_stand_at_round_numbers() -> None:
    assert [(tick.label, tick.place) for tick in Axis("tokens", 0, 8192).ticks()] == [
        ("0", 0), ("2,000", 24.41), ("4,000", 48.83), ("6,000", 73.24), ("8,000", 97.66),
    ]  # fmt: skip
    assert [tick.label for tick in Axis("", 1.9, 4.6, unit=" MB").ticks()] == [
        "2 MB", "2.5 MB", "3 MB", "3.5 MB", "4 MB", "4.5 MB",
    ]  # fmt: skip


def test_logarithmic_ticks_are_powers_or_lie_between_them() -> None:
    assert [tick.label for tick in Axis("", 0.002, 3, logarithmic=True).ticks()] == ["0.01", "0.1", "1"]
    assert [tick.label for tick in Axis("", 0.9, 6, logarithmic=True).ticks()] == ["1", "2", "5"]


@pytest.mark.parametrize("numbers", [(3.0,), (1e-9, 1e9), (0.1, 0.1000001), (5.0, 5.0), (-2.0, 7e5)])
def test_every_number_is_inside_and_there_are_few_ticks(numbers: tuple[float, ...]) -> None:
    axis = Axis.around("", numbers)
    assert all(0 < axis.place(number) < 100 for number in numbers)
    assert len(axis.ticks()) <= MOST_TICKS + 1
    assert all(0 <= tick.place <= 100 for tick in axis.ticks())


def test_what_lies_beyond_is_put_at_the_edge() -> None:
    axis = Axis.around("", [1, 10], logarithmic=True)
    assert axis.place(1e6) == 100 and axis.place(1e-6) == 0
    assert axis.place(10**0.5) == 50


def test_what_is_beyond_is_said_once() -> None:
    points = (Point(0, 50, "inside"), Point(10, 100, "far", is_beyond=True))
    diagram = Diagram("", Axis("", 0, 1), Axis("", 0, 1), (Line("a", points), Line("b", points)))
    assert diagram.beyond == ["far"]
    assert diagram.lines[0].path == "0,50 10,0"
