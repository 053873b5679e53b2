"""The narrowest cut behind a site's keys and values, and what they are made of there."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.match.cut import Cut, narrowest_cut
from kvmix_compile.passes.match.latents import Latents, find_latents
from kvmix_compile.passes.match.sites import AttentionSite, find_sites

FOUR_HEADS, NARROW_HEADS = torch.randn(8, 32), torch.randn(8, 16)


def only_site(captured: Captured) -> AttentionSite:
    return find_sites(captured).matched[0]


def cut_of(captured: Captured) -> Cut:
    cut = narrowest_cut(only_site(captured), captured)
    assert cut is not None
    return cut


def heads(rows: Tensor, matrix: Tensor) -> Tensor:
    """`[batch, tokens, 8]` as four heads of keys or values."""
    return (rows @ matrix).unflatten(-1, (4, -1)).transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def of_a_latent_and_a_rotary_key(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    latent, rotary = value[:, 0], key[:, :1, :, :4].sin()
    keys = torch.cat([heads(latent, NARROW_HEADS), rotary.expand(-1, 4, -1, -1)], dim=-1)
    return attention(query, keys, heads(latent, FOUR_HEADS))


def of_a_latent_each(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, heads(key[:, 0], FOUR_HEADS), heads(value[:, 0], FOUR_HEADS))


def of_one_latent(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    latent = value[:, 0]
    return attention(query, heads(latent, FOUR_HEADS), heads(latent, FOUR_HEADS))


def with_low_rank_adapter(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    latent = value[:, 0]
    values = latent @ FOUR_HEADS + (latent @ torch.full((8, 2), 0.1)) @ torch.full((2, 32), 0.1) * 2
    return attention(query, heads(key[:, 0], FOUR_HEADS), values.unflatten(-1, (4, 8)).transpose(1, 2))


def tied(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    states = key.sin()
    return attention(query, states, states)


def test_of_grouped_queries_it_is_what_is_cached_before_heads_are_repeated(captured) -> None:
    for name, numbers in (("llama", 2 * 2 * 32), ("gemma3", 2 * 2 * 32), ("falcon", 2 * 32), ("gpt2", 2 * 128)):
        assert cut_of(captured(name)).numbers == numbers
        assert find_latents(only_site(captured(name)), captured(name)) is None


def test_of_multi_head_latent_attention_it_is_the_latent_and_the_rotary_key(captured) -> None:
    graph = captured("deepseek_v3")
    cut, latents = cut_of(graph), find_latents(only_site(graph), graph)
    assert cut.numbers == 64 + 16
    assert isinstance(latents, Latents) and set(latents.rows) == set(cut.nodes)
    assert [piece.is_row for piece in latents.key] == [False, True]
    assert latents.saving == 4 * (48 + 32) / 80
    assert latents.arithmetic == (64 + 16 + 64) / (48 + 32)
    assert latents.pays


@pytest.mark.parametrize(
    ("attend", "numbers"),
    [
        (of_a_latent_and_a_rotary_key, 8 + 4),
        (of_a_latent_each, 8 + 8),
        (of_one_latent, 8),
        (with_low_rank_adapter, 8 + 8),
        (tied, 4 * 8),
    ],
)
def test_the_narrowest_is_found_however_it_is_made(capture_toy, attend: Callable[..., Tensor], numbers: int) -> None:
    assert cut_of(capture_toy(attend)).numbers == numbers


def worked_on(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, heads(value[:, 0], FOUR_HEADS).relu())


def moved_by_a_constant(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, heads(value[:, 0], FOUR_HEADS) + 1)


def scaled_by_position(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    values = heads(value[:, 0], FOUR_HEADS)
    return attention(query, key, values * torch.arange(values.shape[2])[:, None])


@pytest.mark.parametrize("attend", [worked_on, moved_by_a_constant, scaled_by_position])
def test_what_is_no_linear_map_of_each_token_is_cached_itself(capture_toy, attend: Callable[..., Tensor]) -> None:
    assert cut_of(capture_toy(attend)).numbers == 4 * 8 + 4 * 8


@pytest.mark.parametrize(
    ("attend", "reason"), [(of_one_latent, "all of them make both"), (tied, "spread over its heads")]
)
def test_narrower_rows_that_cannot_be_attended_to_are_named(
    capture_toy, attend: Callable[..., Tensor], reason: str
) -> None:
    graph = capture_toy(attend)
    with pytest.raises(UnsupportedModelError, match=reason):
        find_latents(only_site(graph), graph)


def test_rows_that_take_more_arithmetic_than_they_save_do_not_pay(captured) -> None:
    graph = captured("mpt")
    latents = find_latents(only_site(graph), graph)
    assert latents is not None and (latents.saving, latents.arithmetic) == (2, 4) and not latents.pays
