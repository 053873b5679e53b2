"""The rows of a step."""

import torch

from kvmix_vllm.steps import Step


def step(*rows: tuple[int, int], shared_at: int = 96) -> Step:
    """Of rows that hold so many tokens and get so many more."""
    held, tokens = [row[0] for row in rows], [row[1] for row in rows]
    return Step.of(tokens, held, torch.tensor(held), shared_at)


def test_rows_of_one_token_go_together_and_others_alone() -> None:
    found = step((10, 1), (20, 1), (0, 7), (5, 1)).read
    assert [(rows.first, rows.end, rows.token, rows.tokens) for rows in found] == [
        (0, 2, 0, 1),
        (2, 3, 2, 7),
        (3, 4, 9, 1),
    ]
    assert [rows.lengths.tolist() for rows in found] == [[10, 20], [0], [5]]


def test_rows_without_tokens_are_left_out() -> None:
    assert [rows.first for rows in step((10, 1), (3, 0), (0, 2)).read] == [0, 2]


def test_a_row_that_may_follow_another_is_written_after_whatever_is_shorter() -> None:
    written = step((192, 5), (50, 1), (96, 1), (95, 1), (0, 200)).written
    assert [rows.held for rows in written] == [50, 95, 0, 96, 192]


def test_tokens_of_rows_are_found_in_the_step() -> None:
    flat = torch.arange(12).view(6, 2, 1)
    one, chunk = step((10, 1), (20, 1), (0, 4)).read
    assert one.of(flat).tolist() == [[[[0]], [[1]]], [[[2]], [[3]]]]
    assert chunk.of(flat).tolist() == [[[[4], [6], [8], [10]], [[5], [7], [9], [11]]]]
