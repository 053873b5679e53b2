"""What a pass did is said, and shown to who asks for it."""

from pathlib import Path

import pytest
import torch
from torch import fx, nn

from kvmix_compile.passes.graph.record import DUMP, PassRecord, recorded


def module() -> fx.GraphModule:
    graph = fx.Graph()
    given = graph.placeholder("given")
    graph.output(graph.call_function(torch.ops.aten.sin.default, (given,)))
    return fx.GraphModule(nn.Module(), graph)


def sines_to_cosines(edited: fx.GraphModule) -> str:
    for node in edited.graph.nodes:
        if node.target is torch.ops.aten.sin.default:
            node.target = torch.ops.aten.cos.default
    return "done"


def test_a_pass_is_known_by_what_it_changed() -> None:
    edited = module()
    record, result = recorded("cosines", edited, lambda: sines_to_cosines(edited))
    assert result == "done" and record == PassRecord("cosines", ("cos 0 -> 1", "sin 1 -> 0"))
    again, _ = recorded("cosines", edited, lambda: sines_to_cosines(edited))
    assert str(again) == "nothing to do"
    assert str(PassRecord("sites", ("2 causal",), ("layers.1: no mask",))) == "2 causal; left layers.1: no mask"


def test_graphs_are_written_before_and_after_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited, folder = module(), tmp_path / "graphs"
    recorded("unseen", module(), lambda: None)
    monkeypatch.setenv(DUMP, str(folder))
    recorded("to cosines", edited, lambda: sines_to_cosines(edited))
    before, after = sorted(folder.iterdir())
    assert before.name.endswith("-to-cosines-before.txt") and after.name.endswith("-to-cosines-after.txt")
    assert "aten.sin" in before.read_text() and "aten.cos" in after.read_text()
