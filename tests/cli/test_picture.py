"""The picture of a plan: what it says, that it fits, and that it is the same text every time."""

import io

import pytest
from rich.console import Console

from kvmix_compile.cli.picture import plan_picture
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.passes.allocate.plan import Plan, SitePlan

SHAPE = SiteShape(kv_heads=2, key_dim=64, value_dim=64)


def plan_of(bits: list[tuple[int, int]], layer: str = "model.layers.{}.self_attn") -> Plan:
    sites = tuple(
        SitePlan(layer.format(index), SHAPE, Precision(key, 32, 4), Precision(value, 32, 16))
        for index, (key, value) in enumerate(bits)
    )
    return Plan(sites, policy="fisher", fingerprint="f00d", sinks=64, recent=128)


def text_of(plan: Plan, width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(plan_picture(plan))
    return console.export_text().splitlines()


def test_every_layer_has_its_bits() -> None:
    lines = text_of(plan_of([(4, 2), (3, 2), (2, 1), (16, 8), (3, 3)]))
    assert [line.split() for line in lines if line.startswith("keys")] == [["keys", "4", "3", "2", "16", "3"]]
    assert [line.split() for line in lines if line.startswith("values")] == [["values", "2", "2", "1", "8", "3"]]
    assert [line.split() for line in lines if line.startswith("layer")] == [["layer", "0", "4"]]


def test_the_picture_in_full() -> None:
    assert text_of(plan_of([(4, 2), (2, 2)])) == [
        "2 layers, model.layers.0.self_attn to model.layers.1.self_attn",
        "",
        "3       ███",
        "        ███ ███",
        "bits    ███ ███",
        "keys     4   2 ",
        "values   2   2 ",
        "layer    0",
        "",
        "    2  groups of 32, 4-bit scales    layers: 1 for keys, 0 for values",
        "    2  groups of 32, 16-bit scales   layers: 0 for keys, 2 for values",
        "    4  groups of 32, 4-bit scales    layers: 1 for keys, 0 for values",
        "",
        "code bits 2.50 (keys 3.00, values 2.00), stored bits 3.14",
        "policy fisher, 64 sink tokens and 128 recent tokens unquantized",
    ]


def test_important_channels_are_seen_and_explained() -> None:
    key = Precision(2, 32, 4, important_bits=(4, 4))
    site = SitePlan("attention", SHAPE, key, Precision(2, 32, 4), ("0123" * 16,) * 2)
    lines = text_of(Plan((site,), policy="fisher", fingerprint="f00d", sinks=64, recent=128))
    assert "keys   3.0 " in lines
    assert any(line.strip().startswith("3.0  4/4/2/2, groups of 32") for line in lines)
    assert any(line.strip().startswith("4/3/2/2: bits by tier") for line in lines)
    assert any("keys 3.00, values 2.00" in line for line in lines)


def test_bars_grow_with_bits() -> None:
    lines = text_of(plan_of([(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]))
    bars = lines[2:5]
    columns = ["".join(line.ljust(30)[8 + 4 * index] for line in reversed(bars)) for index in range(5)]
    assert columns == ["███", "█▄ ", "▆  ", "▃  ", "▂  "]


@pytest.mark.parametrize("layers", [1, 23, 24, 25, 32, 80, 126])
@pytest.mark.parametrize("width", [80, 100, 160])
def test_deep_models_wrap_within_the_terminal(layers: int, width: int) -> None:
    lines = text_of(plan_of([(3, 2)] * layers), width)
    assert max(map(len, lines)) <= min(width, 110)
    keys = [line.split()[1:] for line in lines if line.startswith("keys")]
    assert sum(map(len, keys)) == layers
    numbers = [int(number) for line in lines if line.startswith("layer") for number in line.split()[1:]]
    assert numbers == list(range(0, layers, 4))


def test_a_narrow_terminal_cuts_text_and_keeps_cells() -> None:
    lines = text_of(plan_of([(3, 2)] * 30, layer="a.very.long.name.of.a.module.{}"), width=30)
    assert max(map(len, lines)) <= 30
    assert sum(line.count("3") for line in lines if line.startswith("keys")) == 30


def test_names_are_not_taken_for_markup() -> None:
    assert "[red]0" in text_of(plan_of([(3, 2)], layer="[red]{}"))[0]


def test_cells_have_colours_only_on_a_terminal() -> None:
    plain, terminal = io.StringIO(), io.StringIO()
    Console(file=plain, width=80).print(plan_picture(plan_of([(3, 2)])))
    Console(file=terminal, width=80, force_terminal=True, color_system="256").print(plan_picture(plan_of([(3, 2)])))
    assert "\x1b[" not in plain.getvalue()
    assert "\x1b[" in terminal.getvalue()
