"""The plots of what the benchmarks measured."""

import pytest

from tests.helpers.benchmark_modules import benchmark

pytest.importorskip("matplotlib")
plots = benchmark("plots")


def row(tokens: int, bits: int, quantized: dict[str, float]) -> dict:
    return {
        "batch": 1, "tokens": tokens, "key_bits": bits, "value_bits": bits, "speedup": 3.0,
        "baseline_seconds": {"slow": 4.0, "fast": 3.0}, "quantized_seconds": quantized,
    }  # fmt: skip


def test_others_that_quantize_are_drawn_against_the_same_baseline() -> None:
    others = [{"onnxruntime-8": 1.5, "quanto-4": 6.0}, {"onnxruntime-8": 2.0}]
    rows = [row(tokens, bits, found) for tokens, found in zip((1024, 2048), others, strict=True) for bits in (2, 3)]
    (axes,) = plots.attention({"results": rows, "device": "CPU"}).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines["onnxruntime-8"] == ([1024, 2048], [2.0, 1.5])
    assert lines["quanto-4"] == ([1024], [0.5])
    assert lines["keys 2, values 2 bits"] == ([1024, 2048], [3.0, 3.0])
