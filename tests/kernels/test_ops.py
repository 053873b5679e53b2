"""The operators as graphs call them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvmix_compile.kernels import paged
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import SiteState, StateLayout
from kvmix_compile.kernels.gpu import dispatch
from kvmix_compile.kernels.ops import append_arguments, attend_arguments
from kvmix_compile.kernels.reference import append, attend
from kvmix_compile.kernels.weighting import Weighting
from tests.kernels.attend_cases import Case
from tests.kernels.engine import Engine

LAYOUT = StateLayout(SiteShape(2, 16, 24), key=Precision(3, 32, 4), value=Precision(2, 8, 16), sinks=3, recent=32)
IMPORTANT_KEYS = replace(LAYOUT, key=Precision(2, 32, 4, important_bits=(4, 4)))


def chunk(tokens: int) -> list[Tensor]:
    shapes = ((4, LAYOUT.key_dim), (2, LAYOUT.key_dim), (2, LAYOUT.value_dim))
    return [torch.randn(2, tokens, heads, dim).transpose(1, 2) for heads, dim in shapes]


def filled_state(layout: StateLayout = LAYOUT) -> tuple[SiteState, Tensor]:
    state = SiteState.allocate(layout, 2, 6, torch.float32)
    _, k, v = chunk(100)
    lengths, starts = torch.tensor([0, 0]), torch.tensor([0, 20])
    append(Chunk(key=k, value=v, lengths=lengths, starts=starts), state, layout.storage)
    return state, torch.tensor([100, 80])


def paged_case(tokens: int, starts: list[int]) -> tuple[Case, Pages]:
    """Rows with a past, whose pages hold it and have room for the chunk."""
    lengths = [100, 80]
    case = Case.random(LAYOUT, 2, lengths, starts, tokens, torch.float32)
    engine = Engine(LAYOUT, 2, torch.float32, (32, 1))
    engine.hold(case.state, lengths, [0, 0])
    ends = [length + tokens - start for length, start in zip(lengths, starts, strict=True)]
    for row, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        engine.keep(row, length, end)
    *tensors, sinks = engine.pages(lengths, ends)
    return case, Pages(*(tensor.nan_to_num(0) for tensor in tensors), sinks=sinks)


@pytest.mark.parametrize("layout", [LAYOUT, IMPORTANT_KEYS])
@pytest.mark.parametrize(("tokens", "starts"), [(1, [0, 0]), (40, [0, 7])])
def test_torch_accepts_the_operators(tokens: int, starts: list[int], layout: StateLayout) -> None:
    state, lengths = filled_state(layout)
    q, k, v = chunk(tokens)
    precisions = layout.key.as_ints(), layout.value.as_ints(), layout.recent
    stored = (k, v, lengths, torch.tensor(starts), *state.tensors(), *precisions)
    by_head = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for weighting in (
        (0.25, 0.0, 0),
        (0.25, 0.0, 0, 7),
        (0.25, 0.0, 0, 0, by_head, by_head),
        (1.0, 0.0, 5, 0, None, by_head),
    ):
        torch.library.opcheck(torch.ops.kvmix.attend.default, (q, *stored, *weighting))
    torch.library.opcheck(torch.ops.kvmix.attend_stepwise.default, (q, *stored, 0.25, 0.0, 0))
    torch.library.opcheck(torch.ops.kvmix.append.default, stored)


@pytest.mark.parametrize(("tokens", "starts"), [(1, [0, 0]), (40, [0, 7])])
def test_torch_accepts_the_operators_over_pages(tokens: int, starts: list[int]) -> None:
    case, pages = paged_case(tokens, starts)
    arguments, by_name = attend_arguments(case.q, case.chunk, pages, LAYOUT.storage, Weighting(0.25))
    for operator in (torch.ops.kvmix.attend_paged, torch.ops.kvmix.attend_stepwise_paged):
        torch.library.opcheck(operator.default, arguments, by_name)
    torch.library.opcheck(torch.ops.kvmix.append_paged.default, append_arguments(case.chunk, pages, LAYOUT.storage))


def test_the_operators_over_pages_are_the_reference() -> None:
    (case, pages), weighting = paged_case(40, [0, 2]), Weighting(0.25, 5.0, 30)
    other = Pages(*(tensor.clone() for tensor in pages.tensors()), sinks=pages.sinks)
    arguments, by_name = attend_arguments(case.q, case.chunk, pages, LAYOUT.storage, weighting)
    attended = torch.ops.kvmix.attend_paged.default(*arguments, **by_name)
    torch.testing.assert_close(attended, paged.attend(case.q, case.chunk, other, LAYOUT.storage, weighting))
    torch.ops.kvmix.append_paged.default(*append_arguments(case.chunk, pages, LAYOUT.storage))
    paged.append(case.chunk, other, LAYOUT.storage)
    assert all(torch.equal(one, two) for one, two in zip(pages.tensors(), other.tensors(), strict=True))


@pytest.mark.parametrize("layout", [LAYOUT, IMPORTANT_KEYS])
def test_the_operators_are_the_reference(layout: StateLayout) -> None:
    state, lengths = filled_state(layout)
    other = SiteState(*(tensor.clone() for tensor in state.tensors()))
    q, k, v = chunk(5)
    inputs = (k, v, lengths, torch.tensor([0, 2]))
    attended = torch.ops.kvmix.attend.default(
        *(q, *inputs, *state.tensors(), layout.key.as_ints(), layout.value.as_ints(), layout.recent, 0.25, 5.0, 30)
    )
    torch.ops.kvmix.append.default(
        *(*inputs, *state.tensors(), layout.key.as_ints(), layout.value.as_ints(), layout.recent)
    )
    records = Chunk(*inputs), other, layout.storage
    torch.testing.assert_close(attended, attend(q, *records, Weighting(0.25, 5.0, 30)))
    append(*records)
    assert all(torch.equal(one, two) for one, two in zip(state.tensors(), other.tensors(), strict=True))


def test_channels_are_ordered_head_by_head() -> None:
    x = torch.randn(2, 3, 4, 16).transpose(1, 2)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    ordered = torch.ops.kvmix.order_channels.default(x, order)
    assert ordered.is_contiguous()
    # Heads 0 and 1 are of the first order's group, heads 2 and 3 of the second's.
    for head in range(4):
        assert torch.equal(ordered[:, head], x[:, head, :, order[head // 2]])


def test_a_graph_compiles_around_the_operators() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *state: Tensor) -> Tensor:
        starts = torch.zeros_like(lengths)
        stored = (k, v, lengths, starts, *state, LAYOUT.key.as_ints(), LAYOUT.value.as_ints(), LAYOUT.recent)
        attended = torch.ops.kvmix.attend.default(q, *stored, 0.25, 0.0, 0)
        torch.ops.kvmix.append.default(*stored)
        return attended

    state, lengths = filled_state()
    other = SiteState(*(tensor.clone() for tensor in state.tensors()))
    inputs = chunk(4)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs, lengths, *state.tensors()), step(*inputs, lengths, *other.tensors()))
    assert all(torch.equal(one, two) for one, two in zip(state.tensors(), other.tensors(), strict=True))


@pytest.mark.parametrize("layout", [LAYOUT, replace(LAYOUT, key=Precision(16), value=Precision(16))])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_a_state_keeps_its_dtype_under_autocast_and_for_chunks_of_another(
    autocast: torch.dtype, layout: StateLayout
) -> None:
    state, lengths = filled_state(layout)
    other = SiteState(*(tensor.clone() for tensor in state.tensors()))
    q, *inputs = (tensor.to(autocast) for tensor in chunk(40))
    options = (layout.key.as_ints(), layout.value.as_ints(), layout.recent)

    def step(state: SiteState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stored = (k, v, lengths, torch.tensor([0, 2]), *state.tensors(), *options)
        attended = torch.ops.kvmix.attend.default(q, *stored, 0.25, 5.0, 30)
        torch.ops.kvmix.append.default(*stored)
        return attended

    expected = step(other, q.float(), *(tensor.float() for tensor in inputs))
    with torch.autocast("cpu", dtype=autocast):
        found = step(state, q, *inputs)
    assert found.dtype == autocast
    assert torch.equal(found, expected.to(autocast))
    assert all(torch.equal(one, two) for one, two in zip(state.tensors(), other.tensors(), strict=True))


def test_a_malformed_precision_is_refused() -> None:
    state, lengths = filled_state()
    _, k, v = chunk(1)
    with pytest.raises(KVMixError, match="bits, group, scale_bits"):
        torch.ops.kvmix.append.default(k, v, lengths, torch.zeros_like(lengths), *state.tensors(), [2], [2, 8, 16], 32)


def test_no_gradient_enters_the_state() -> None:
    state, lengths = filled_state()
    q, k, v = (tensor.requires_grad_() for tensor in chunk(40))
    stored = (k, v, lengths, torch.zeros_like(lengths), *state.tensors())
    options = (LAYOUT.key.as_ints(), LAYOUT.value.as_ints(), LAYOUT.recent)
    torch.ops.kvmix.append.default(*stored, *options)
    torch.ops.kvmix.attend.default(q, *stored, *options, 0.25, 0.0, 0)
    assert not any(tensor.requires_grad for tensor in state.tensors())


def test_queries_of_values_that_are_keys_run_the_reference_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Triton kernel knows of them."""
    monkeypatch.setattr(dispatch, "_triton_serves", lambda chunk: True)
    layout = StateLayout(SiteShape(1, 8, 16), key=Precision(16), value=Precision(2, 16, 4), sinks=3, recent=32)
    case = Case.random(layout, 4, [100, 7], [0, 0], 1, torch.float32, values_are_keys=True)
    assert torch.equal(dispatch.attend_on_cuda(*case.arguments()), attend(*case.arguments()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda pages: {"raw": pages.raw.long()}, "int32"),
        (lambda pages: {"raw_k": pages.raw_k.mT.contiguous().mT}, "channels last"),
        (lambda pages: {"packed_v": pages.packed_v[..., 4:]}, "multiples of 8 bytes"),
    ],
)
def test_pages_that_triton_cannot_read_are_refused_on_cuda(
    changed: Callable[[Pages], dict[str, Tensor]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_triton_serves", lambda chunk: True)
    case, pages = paged_case(1, [0, 0])
    wrong = pages._replace(**changed(pages))
    with pytest.raises(KVMixError, match=message):
        dispatch.append_on_cuda(case.chunk, wrong, LAYOUT.storage)
    with pytest.raises(KVMixError, match=message):
        dispatch.attend_on_cuda(case.q, case.chunk, wrong, LAYOUT.storage, Weighting(0.25))
