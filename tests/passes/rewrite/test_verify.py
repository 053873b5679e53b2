"""Verify: passes for what was understood, and fails for every kind of graph that would compute something else."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kvmix_compile.models_zoo import plain
from kvmix_compile.models_zoo.tiny import TINY
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.export import capture
from kvmix_compile.passes.errors import CaptureError, VerifyError
from kvmix_compile.passes.graph.vocabulary import operation
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.rewrite import nudged
from kvmix_compile.passes.rewrite import verify as verify_module
from kvmix_compile.passes.rewrite.rewrite import Rewritten, rewrite


def verify(captured: Captured) -> float:
    return verify_module.verify(captured, find_sites(captured).matched)


@pytest.mark.parametrize("name", [*TINY, "hand_written", "fused_arange"])
def test_every_architecture_passes_with_room_to_spare(captured, name: str) -> None:
    assert verify(captured(name)) < 1e-4


@pytest.mark.parametrize("longest_context", [1, 7, 8, 20, 50])
def test_a_model_of_few_positions_is_verified_on_as_many(longest_context: int) -> None:
    assert verify(capture(plain.fused_arange(max_positions=longest_context))) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rounding_of_the_models_dtype_is_allowed_for(dtype: torch.dtype) -> None:
    verify(capture(plain.fused_arange().to(dtype)))


def test_a_graph_that_does_not_run_for_every_length_is_a_capture_error() -> None:
    """As export makes of loops over chunks of the text: nothing but its error says that the graph is for one length."""
    graph = capture(plain.convolution())
    convolution = next(node for node in graph.graph.nodes if operation(node) == "conv1d")
    with graph.graph.inserting_before(convolution):
        source = convolution.args[0]
        short = graph.graph.call_function(torch.ops.aten.reshape.default, (source, [-1, 11]))
    convolution.replace_input_with(source, short)
    graph.module.recompile()
    with pytest.raises(CaptureError, match=r"for every length.*conv1d in layers\.0\.convolution"):
        verify(graph)


# Models that mix tokens otherwise than by attention


def test_a_convolution_is_named() -> None:
    with pytest.raises(VerifyError, match=r"conv1d in layers\.0\.convolution.*not supported"):
        verify(capture(plain.convolution()))


def shifted(hidden: Tensor) -> Tensor:
    return hidden + F.pad(hidden[:, :-1], (0, 0, 1, 0))


def summed(hidden: Tensor) -> Tensor:
    return hidden + hidden.cumsum(dim=1) / 10


def averaged_over_the_text(hidden: Tensor) -> Tensor:
    return hidden + hidden.mean(dim=1, keepdim=True)


def first_token_everywhere(hidden: Tensor) -> Tensor:
    return hidden + hidden[:, :1]


class Mixing(nn.Module):
    """fused_arange with something done to its hidden states first."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.decoder, self.mix = plain.fused_arange(layers=1), mix

    def forward(self, input_ids: Tensor) -> Tensor:
        decoder = self.decoder
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.mix(decoder.embedding(input_ids)) + decoder.positions(positions)
        return decoder.head(decoder.norm(decoder.layers[0](hidden)))


@pytest.mark.parametrize("mix", [shifted, summed, averaged_over_the_text, first_token_everywhere])
def test_other_ways_to_mix_tokens_are_noticed(mix: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(VerifyError, match=r"logits differ by \d"):
        verify(capture(Mixing(mix).eval()))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def test_scores_summed_up_beside_attention_are_named(capture_toy) -> None:
    """As Granite's layers with sinks do, which scale what attention gives."""

    def scaled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT
        past = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return attend(query, key, value) * scores.masked_fill(~past, -1e9).logsumexp(-1, True).sigmoid()

    with pytest.raises(VerifyError, match="logsumexp in the model"):
        verify(capture_toy(scaled))


def test_keys_may_be_used_elsewhere_for_their_own_token(capture_toy) -> None:
    assert verify(capture_toy(lambda q, k, v: attend(q, k, v) + k.sin())) < 1e-4


def test_keys_of_the_past_used_elsewhere_are_noticed(capture_toy) -> None:
    with pytest.raises(VerifyError, match="cumsum in the model"):
        verify(capture_toy(lambda q, k, v: attend(q, k, v) + k.cumsum(dim=2) / 10))


def test_a_site_left_out_is_noticed(captured) -> None:
    sites = find_sites(captured("llama")).matched
    with pytest.raises(VerifyError):
        verify_module.verify(captured("llama"), sites[:1])


# Models that round their activations


def rounded(values: Tensor) -> Tensor:
    """To 8 bits, by the largest of all tokens, as dynamic quantization does for each tensor."""
    step = values.abs().amax() / 127
    return (values / step).round() * step


class RoundedLinear(nn.Linear):
    """Linear of rounded activations."""

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(rounded(values), self.weight, self.bias)


def test_activations_rounded_by_what_is_read_together_are_what_is_blamed() -> None:
    model = plain.fused_arange()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RoundedLinear
    with pytest.raises(
        VerifyError, match=r"rounds its activations.*quantize its weights and not its activations"
    ) as raised:
        verify(capture(model.eval()))
    assert "token to token" not in str(raised.value) and "inf" not in str(raised.value)


def test_rounding_is_not_blamed_for_more_than_it_makes() -> None:
    with pytest.raises(VerifyError, match="mixes tokens otherwise than by attention"):
        verify(capture(Mixing(lambda hidden: rounded(shifted(hidden))).eval()))


@pytest.mark.parametrize("name", ["hand_written", "mixtral"])
def test_the_logits_of_real_numbers_move_as_little_as_embeddings(captured, name: str) -> None:
    """Of mixtral's tokens some may go to other experts."""
    graph = captured(name)
    assert nudged.response(graph, graph.random_ids(1, 100)[0]) < 10 * nudged.nudge(graph)


# Rewritten graphs that are wrong


def swap_keys_and_values(graph: fx.Graph) -> None:
    for node in of(graph, "append"):
        node.args = (node.args[1], node.args[0], *node.args[2:])


def forget_to_append(graph: fx.Graph) -> None:
    graph.erase_node(of(graph, "append")[1])


def append_before_attending(graph: fx.Graph) -> None:
    for attend, append in zip(of(graph, "attend"), of(graph, "append"), strict=True):
        attend.prepend(append)


def mix_up_the_layers(graph: fx.Graph) -> None:
    """Both layers attend to the first one's cache."""
    first, second = of(graph, "attend")
    second.args = (*second.args[:5], *first.args[5:11], *second.args[11:])


def change(index: int, value: object) -> Callable[[fx.Graph], None]:
    def mutate(graph: fx.Graph) -> None:
        for node in of(graph, "attend"):
            node.args = (*node.args[:index], value, *node.args[index + 1 :])

    mutate.__name__ = f"argument {index} becomes {value}"
    return mutate


def ignore_positions(graph: fx.Graph) -> None:
    """Every chunk is rotated as if it were the first."""
    positions = next(node for node in graph.nodes if node.name == "position_ids")
    with graph.inserting_after(positions):
        first = graph.call_function(torch.ops.aten.slice.Tensor, (positions, 1, 0, 1))
    with graph.inserting_after(first):
        from_zero = graph.call_function(torch.ops.aten.sub.Tensor, (positions, first))
    positions.replace_all_uses_with(from_zero, delete_user_cb=lambda user: user not in (first, from_zero))


def of(graph: fx.Graph, name: str) -> list[fx.Node]:
    return [node for node in graph.nodes if operation(node) == name]


MUTATIONS = [
    swap_keys_and_values,
    forget_to_append,
    append_before_attending,
    mix_up_the_layers,
    ignore_positions,
    change(14, 0.2),  # scale; 0.177 is right
    change(15, 5.0),  # soft cap
    change(16, 30),  # sliding window
]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_wrong_rewrite_is_noticed(captured, monkeypatch, mutate: Callable[[fx.Graph], None]) -> None:
    def wrong(*arguments: object) -> Rewritten:
        result = rewrite(*arguments)  # type: ignore[arg-type]
        mutate(result.module.graph)
        result.module.recompile()
        return result

    monkeypatch.setattr(verify_module, "rewrite", wrong)
    with pytest.raises(VerifyError, match="other logits for two rows|something besides the attention"):
        verify(captured("llama"))


def test_a_wrong_window_is_noticed(captured, monkeypatch) -> None:
    def wrong(captured: Captured, sites: Sequence, *rest: object) -> Rewritten:
        result = rewrite(captured, sites, *rest)  # type: ignore[arg-type]
        change(16, 25)(result.module.graph)
        result.module.recompile()
        return result

    monkeypatch.setattr(verify_module, "rewrite", wrong)
    with pytest.raises(VerifyError):
        verify(captured("mistral"))
