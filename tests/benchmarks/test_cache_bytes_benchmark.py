"""The benchmark of a cache's bytes counts both caches as they are."""

import torch

from tests.helpers.benchmark_modules import benchmark
from tests.helpers.toy_llama import ids, original, quantized

cache_bytes = benchmark("cache_bytes")


def test_both_caches_are_counted_at_every_length() -> None:
    rows = cache_bytes.measure(original(), quantized(), ids(1, 300)[0], [5, 300])
    assert [(row["dtype"], row["tokens"]) for row in rows] == [("float32", 5), ("float32", 300)]
    for row in rows:
        # Two layers of two heads, keys and values of 32 channels.
        assert row["dynamic"] == row["in_32_bits"] == 2 * row["in_16_bits"] == row["tokens"] * 2 * 2 * 2 * 32 * 4
        assert row["kvmix"] == quantized().kvmix_plan.cache_bytes(row["tokens"], 1, torch.float32)
    # Both in 16 bits: half of float32, where nothing is packed yet.
    assert rows[1]["ratio"] < 0.3 < 0.5 < rows[0]["ratio"] < 0.51
