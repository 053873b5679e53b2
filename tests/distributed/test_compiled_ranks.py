"""compile=True where weights are spread over two processes. Two graphs in each take Inductor most of a minute, so this
is one of those tests that `make test-compiled` runs.
"""

from typing import Any

import pytest
import torch

from tests.distributed.starting import seen_by_ranks
from tests.distributed.test_tensor_parallel import ONE_CODE, ROUNDING, largest

pytestmark = pytest.mark.choices


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes saw."""
    return seen_by_ranks("two_compiling_ranks.py", tmp_path_factory.mktemp("ranks"))


def test_compiled_graphs_write_what_the_others_write(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        compiled, as_it_is = found["compiled"], found["as it is"]
        assert torch.equal(compiled["text"], as_it_is["text"])
        assert torch.equal(compiled["padded"], as_it_is["padded"])
        assert largest(compiled["logits"][:, :-1], as_it_is["logits"][:, :-1]) < ROUNDING
        assert largest(compiled["logits"][:, -1], as_it_is["logits"][:, -1]) < ONE_CODE


def test_what_fails_in_one_process_is_refused_in_both(ranks: list[dict[str, Any]]) -> None:
    first, second = (found["failure"] for found in ranks)
    assert "Inductor could not compile the model: no room for what is compiled" in first
    assert first == second
