"""The requests that benchmarks.serving sends; that it runs needs vLLM."""

from tests.helpers.benchmark_modules import benchmark

serving = benchmark("serving")


def test_requests_arrive_in_order_and_half_of_them_begin_alike() -> None:
    sent = serving.requests([100, 400], count=8, rate=2.0, vocabulary=1000)
    assert [len(one.prompt) for one in sent] == [100, 100, 400, 400, 100, 100, 400, 400]
    assert [one.arrival for one in sent] == sorted({one.arrival for one in sent})
    shared = int(serving.COMMON * 100)
    alike = [one.prompt[:shared] for one in sent[1::2]]
    assert all(begin == alike[0] for begin in alike)
    assert len({tuple(one.prompt[:shared]) for one in sent[::2]}) == 4


def test_the_same_requests_are_sent_to_all() -> None:
    first, second = (serving.requests([100], count=4, rate=0, vocabulary=1000) for _ in range(2))
    assert first == second and all(one.arrival == 0 for one in first)


def test_the_median_of_several_runs_is_told() -> None:
    runs = [{"contender": "with a plan", "preemptions": 0, "tokens_a_second": speed} for speed in (40.0, 10.0, 30.0)]
    assert serving.middle(runs) == {"contender": "with a plan", "preemptions": 0, "tokens_a_second": 30.0}
