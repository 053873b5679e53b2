"""What tables say of sizes."""

import pytest

from kvmix_compile.cli.tables import CacheSize, compared


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [
        (500, "2.00 times smaller than"),
        (990, "1.01 times smaller than"),
        (996, "as large as"),
        (1000, "as large as"),
        (1004, "as large as"),
        (1010, "1.01 times larger than"),
        (7000, "7.00 times larger than"),
    ],
)
def test_bytes_are_compared_with_a_thousand(nbytes: int, words: str) -> None:
    assert compared(nbytes, 1000) == words


def test_a_cache_larger_than_in_16_bits_is_said_to_be() -> None:
    assert str(CacheSize(tokens=55, elements=500_000, nbytes=2_000_000)) == (
        "cache of 55 tokens: 2.00 MB, 2.00 times larger than in 16 bits (1.00 MB); 32.00 bits per element, all counted"
    )
