"""Positions: models that count their own go on counting from what the cache holds."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvmix_compile.passes.capture.export import capture
from kvmix_compile.passes.errors import VerifyError
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.rewrite.rewrite import Rewritten, rewrite
from kvmix_compile.passes.rewrite.verify import verify
from tests.helpers.stored import stored_alike

LONG, SHORT = 8192, 256  # rows of tables of positions

Turn = Callable[["Decoder", Tensor], Tensor]


class Decoder(nn.Module):
    """One layer of attention over states that `turn(self, states [batch, tokens, width])` gave their positions."""

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.learned = nn.Embedding(256, 32)
        self.register_buffer("table", torch.randn(LONG, 32))
        self.register_buffer("batched_table", torch.randn(1, LONG, 32), persistent=False)
        self.register_buffer("short_table", torch.randn(SHORT, 32))
        self.register_buffer("segments", torch.zeros(1, LONG, dtype=torch.int64), persistent=False)
        self.turn = turn

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.turn(self, self.embedding(input_ids))
        states = hidden.unflatten(-1, (4, 8)).transpose(1, 2)
        return self.head(
            F.scaled_dot_product_attention(states, states, states, is_causal=True).transpose(1, 2).flatten(2)
        )


def count(states: Tensor, **options: object) -> Tensor:
    return torch.arange(states.shape[1], device=states.device, **options)


COUNTED: dict[str, Turn] = {
    "learned": lambda model, states: states + model.learned(count(states)),
    "arange from an offset": lambda model, states: states + model.learned(count(states) + 2),
    "arange with both ends": lambda model, states: states + model.learned(torch.arange(0, states.shape[1])),
    "a table sliced": lambda model, states: states * model.table[: states.shape[1]],
    "a table sliced in its second dimension": lambda model, states: states * model.batched_table[:, : states.shape[1]],
    "a small table": lambda model, states: states * model.short_table[: states.shape[1]],
    "a table indexed": lambda model, states: states * model.table[count(states)],
    "angles": lambda model, states: states * torch.cos(count(states)[:, None] * 0.1),
    "counted as floats": lambda model, states: states * torch.cos(count(states, dtype=torch.float32)[:, None] * 0.1),
    "angles by outer": lambda model, states: states * torch.outer(count(states).float(), torch.arange(32) / 64).cos(),
    "counted twice": lambda model, states: states * model.table[: states.shape[1]] + model.learned(count(states)),
}
UNCOUNTED: dict[str, Turn] = {
    "no positions": lambda model, states: states.sin(),
    "a constant arange": lambda model, states: states * torch.cos(torch.arange(32) / 10),
    "the segment that all tokens are of": lambda model, states: (
        states + model.learned(model.segments[:, : states.shape[1]])
    ),
    "a constant slice": lambda model, states: states * model.table[:1, :32],
}
# Counting in ways that are not understood must be noticed, never computed wrongly.
NOT_UNDERSTOOD: dict[str, Turn] = {
    "counted by cumsum": lambda model, states: (
        states + model.learned(torch.ones(states.shape[1], dtype=torch.int64, device=states.device).cumsum(0) - 1)
    ),
    "counted backwards": lambda model, states: states * torch.cos(count(states).flip(0)[:, None] * 0.1),
    "counted in twos": lambda model, states: states * torch.cos(torch.arange(0, 2 * states.shape[1], 2)[:, None] * 0.1),
}


def rewritten(turn: Turn) -> tuple[Rewritten, float]:
    torch.manual_seed(0)
    captured = capture(Decoder(turn).eval())
    sites = find_sites(captured).matched
    return rewrite(captured, sites, stored_alike(sites)), verify(captured, sites)


@pytest.mark.parametrize("name", COUNTED)
def test_counting_goes_on_and_rows_must_be_equal(name: str) -> None:
    result, share = rewritten(COUNTED[name])
    assert share < 1e-3 and result.equal_rows


@pytest.mark.parametrize("name", UNCOUNTED)
def test_what_does_not_count_is_left_alone(name: str) -> None:
    result, share = rewritten(UNCOUNTED[name])
    assert share < 1e-3 and not result.equal_rows


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_counting_that_is_not_understood_is_noticed(name: str) -> None:
    with pytest.raises(VerifyError):
        rewritten(NOT_UNDERSTOOD[name])


def test_a_table_limits_the_context() -> None:
    captured = capture(Decoder(COUNTED["a small table"]).eval())
    assert captured.longest_context == SHORT


def test_given_positions_are_not_shifted_again(captured) -> None:
    for name in ("llama", "gpt2", "hand_written"):
        sites = find_sites(captured(name)).matched
        assert not rewrite(captured(name), sites, stored_alike(sites)).equal_rows
