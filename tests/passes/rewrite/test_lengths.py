"""Lengths: whatever a forward does with the number of its rows and tokens is equal to the model, or refused by name."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kvmix_compile
from kvmix_compile import KVMixCache
from kvmix_compile.errors import KVMixError
from kvmix_compile.models_zoo import plain
from kvmix_compile.passes.capture.export import capture
from kvmix_compile.passes.rewrite.lengths import broken_assumptions

Factor = Callable[[int, int], object]


class Scaled(nn.Module):
    """fused_arange, its hidden states times what `factor` makes of the numbers of rows and tokens."""

    def __init__(self, factor: Factor) -> None:
        super().__init__()
        self.decoder, self.factor = plain.fused_arange(layers=1), factor

    def forward(self, input_ids: Tensor) -> Tensor:
        decoder, (rows, tokens) = self.decoder, input_ids.shape
        positions = torch.arange(tokens, device=input_ids.device)
        hidden = decoder.embedding(input_ids) * self.factor(rows, tokens) + decoder.positions(positions)
        return decoder.head(decoder.norm(decoder.layers[0](hidden)))


TABLE = torch.linspace(1, 3, 600)

# Another path for some sizes.
BRANCHES: dict[str, tuple[Factor, str]] = {
    "one row": (lambda rows, _: 3.0 if rows == 1 else 1.0, "other logits for one row"),
    "one token": (lambda _, tokens: 3.0 if tokens == 1 else 1.0, "other logits for rows of one token"),
    "one of each": (lambda rows, tokens: 3.0 if rows == tokens == 1 else 1.0, "holds where rows != tokens"),
    "several rows": (lambda rows, _: 1.0 if rows < 5 else 3.0, "for a batch beyond 4"),
    "a multiple": (lambda _, tokens: 3.0 if tokens % 64 == 0 else 1.0, r"holds where \(tokens % 64\) != 0"),
    "a ratio": (lambda _, tokens: max(1.0, tokens / 200), r"tokens / 200"),
    "more rows than tokens": (lambda rows, tokens: 3.0 if rows > tokens else 1.0, "holds where rows <= tokens"),
    "a product": (lambda rows, tokens: 3.0 if rows * tokens > 1000 else 1.0, r"rows\*tokens <= 1000"),
    "an even product": (lambda rows, tokens: 3.0 if rows * tokens % 2 == 0 else 1.0, r"\(rows\*tokens\) % 2"),
    "a root": (lambda _, tokens: 3.0 if tokens**0.5 > 15 else 1.0, r"tokens.*0\.5.* <= 15"),
    "one length": (lambda _, tokens: 3.0 if tokens == 200 else 1.0, "holds where tokens != 200"),
    "a long text": (lambda _, tokens: 3.0 if tokens > 300 else 1.0, "beyond 300"),
    "a logarithm": (lambda _, tokens: 3.0 if math.log(tokens) > 5 else 1.0, "sequence length"),
}

# The same path, in which a size becomes a value.
VALUES: dict[str, tuple[Factor, str]] = {
    "itself": (lambda _, tokens: tokens / 100, "computes with the size .*tokens.*mul"),
    "the rows": (lambda rows, _: 1.0 + rows, "computes with the size .*rows"),
    "rounded": (lambda _, tokens: 1.0 + tokens // 300, "computes with the size .*tokens // 300"),
    "its root": (lambda _, tokens: tokens**0.5, "computes with the size .*tokens.*0.5"),
    "a tensor": (lambda _, tokens: torch.where(torch.tensor(tokens) > 200, 3.0, 1.0), "computes with the size tokens"),
    "filled": (lambda rows, tokens: torch.full((rows, 1, 1), tokens / 50), "computes with the size .*tokens"),
    "a table's row": (lambda _, tokens: TABLE[tokens], "beyond 599"),
    "the number of positions": (lambda _, tokens: torch.arange(tokens).max() / 100, "logits differ"),
}  # fmt: skip

HARMLESS: dict[str, Factor] = {
    "nothing": lambda rows, tokens: 1.0,
    "paths that do the same": lambda rows, tokens: 2.0 if tokens % 64 == 0 else 2.0,
    "a shape": lambda rows, tokens: torch.ones(rows, tokens, 1) * 2,
    "a check": lambda rows, tokens: 1.0 if rows * tokens > 0 else 1 / 0,
}


def apply(factor: Factor) -> nn.Module:
    return kvmix_compile.apply(Scaled(factor).eval(), budget=16, calibration=torch.arange(300) % 64)


@pytest.mark.parametrize("name", [*BRANCHES, *VALUES])
def test_what_depends_on_sizes_is_refused_by_name(name: str) -> None:
    factor, words = (BRANCHES | VALUES)[name]
    with pytest.raises(KVMixError, match=words):
        apply(factor)


@pytest.mark.parametrize("name", ["a multiple", "a product", "itself", "several rows", "a long text"])
def test_the_line_is_named(name: str) -> None:
    with pytest.raises(KVMixError, match=r"test_lengths\.py"):
        apply((BRANCHES | VALUES)[name][0])


@pytest.mark.parametrize("name", HARMLESS)
def test_what_makes_no_difference_is_taken(name: str) -> None:
    model = Scaled(HARMLESS[name]).eval()
    small = kvmix_compile.apply(model, budget=16, calibration=torch.arange(300) % 64)
    for rows, tokens in ((1, 1), (1, 64), (8, 65), (2, 300)):
        ids = torch.randint(64, (rows, tokens), generator=torch.Generator().manual_seed(0))
        cache = KVMixCache(small)
        torch.testing.assert_close(small(ids, cache=cache).logits, model(ids), atol=1e-4, rtol=1e-4)


def test_assumptions_that_hold_for_all_sizes_are_none() -> None:
    """As mixtures of experts make them, of rows times tokens."""
    captured = capture(Scaled(lambda rows, tokens: 1.0 if 8 * rows * tokens >= rows * tokens else 2.0).eval())
    assert broken_assumptions(captured, None) == []


@pytest.mark.parametrize(
    ("name", "smallest"), [("a multiple", (1, 64)), ("a product", (1, 1001)), ("one length", (1, 200))]
)
def test_the_smallest_sizes_that_break_an_assumption_are_found(name: str, smallest: tuple[int, int]) -> None:
    (assumption,) = broken_assumptions(capture(Scaled(BRANCHES[name][0]).eval()), 4096)
    assert assumption.broken[0] == smallest


def test_an_assumption_beyond_the_models_positions_is_none() -> None:
    captured = capture(Scaled(BRANCHES["one length"][0]).eval())
    assert broken_assumptions(captured, 199) == []
