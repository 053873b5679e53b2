"""The benchmark of a start takes each stage's median."""

from tests.helpers.benchmark_modules import benchmark

start = benchmark("start")


def test_medians_are_of_each_stage() -> None:
    runs = [{"import": 1.0, "all": 9.0}, {"import": 3.0, "all": 4.0}, {"import": 2.0, "all": 5.0}]
    assert start.medians(runs) == {"import": 2.0, "all": 5.0}
