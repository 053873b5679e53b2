"""The requests that benchmarks.serving sends; that it runs needs vLLM."""

from benchmarks.serving import COMMON, requests


def test_requests_arrive_in_order_and_half_of_them_begin_alike() -> None:
    sent = requests([100, 400], count=8, rate=2.0, vocabulary=1000)
    assert [len(one.prompt) for one in sent] == [100, 100, 400, 400, 100, 100, 400, 400]
    assert [one.arrival for one in sent] == sorted({one.arrival for one in sent})
    shared = int(COMMON * 100)
    alike = [one.prompt[:shared] for one in sent[1::2]]
    assert all(begin == alike[0] for begin in alike)
    assert len({tuple(one.prompt[:shared]) for one in sent[::2]}) == 4


def test_the_same_requests_are_sent_to_all() -> None:
    first, second = (requests([100], count=4, rate=0, vocabulary=1000) for _ in range(2))
    assert first == second and all(one.arrival == 0 for one in first)
