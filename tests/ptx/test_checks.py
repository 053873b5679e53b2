"""What a kernel must not do is noticed: each check has a kernel that is wrong on purpose, and one that is right."""

import pytest
import torch

pytest.importorskip("triton")

from tests.ptx.driver import PROGRAMS_AT_ONCE, launch
from tests.ptx.instructions import Compiler
from tests.ptx.syntax import PtxError

THREADS = 64

# Two warps. %r1: the thread; %rd1: the tensor; %rd2: an address in it for the thread; %r2: one of shared memory.
KERNEL = """
.version 8.4
.target sm_90a
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 tensor
)
.reqntid 64
{{
    .reg .pred %p<4>;
    .reg .b16 %rs<4>;
    .reg .b32 %r<20>;
    .reg .b64 %rd<8>;
    ld.param.b64 %rd1, [tensor];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd2, %rd1, %rd3;
    shl.b32 %r2, %r1, 2;
    and.b32 %r3, %r1, 31;
    xor.b32 %r4, %r2, 128;
    {body}
    ret;
}}
"""


def run(body: str, programs: int = 1, elements: int = THREADS, shared: int = 256) -> torch.Tensor:
    """The tensor, 1, 2, 3 .. before."""
    tensor = torch.arange(1, elements + 1, dtype=torch.int32)
    launch(Compiler(KERNEL.format(body=body)), (programs, 1, 1), [tensor.data_ptr()], [tensor], shared)
    return tensor


# In shared memory thread t has four bytes at 4 t; %r4 is where the thread 32 further, of the other warp, has its own.
SWAPPED = """
ld.global.b32 %r5, [%rd2];
st.shared.b32 [%r2], %r5;
bar.sync 0;
ld.shared.b32 %r6, [%r4];
st.global.b32 [%rd2], %r6;
"""

COPIED = """
cp.async.ca.shared.global [%r2], [%rd2], 4;
cp.async.commit_group;
cp.async.wait_group 0;
bar.sync 0;
ld.shared.b32 %r6, [%r4];
st.global.b32 [%rd2], %r6;
"""


def test_what_is_right_passes() -> None:
    expected = [*range(33, 65), *range(1, 33)]
    assert run(SWAPPED).tolist() == run(COPIED).tolist() == expected


def test_threads_that_part_meet_again() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 5;
    @%p1 bra $small;
    mov.u32 %r7, 100;
    bra.uni $after;
$small:
    mov.u32 %r7, 200;
$after:
    shfl.sync.bfly.b32 %r8, %r7, 1, 31, -1;
    st.global.b32 [%rd2], %r8;
    """
    assert run(body).tolist() == [200, 200, 200, 200, 100, 200, *[100] * 58]


WRONG = {
    "outside of all tensors": "ld.global.b32 %r5, [%rd2+4];",
    "4 bytes outside of all tensors": "st.global.b32 [%rd2+-4], %r1;",
    "not aligned": "ld.global.b32 %r5, [%rd1+2];",
    "beyond its 256": "st.shared.b32 [%r2+4], %r1;",
    "shared memory: an access of 8 bytes that is not aligned": "st.shared.b64 [%r3], %rd2;",
    "that nobody wrote": "ld.shared.b32 %r5, [%r2];",
    "read that another warp wrote": SWAPPED.replace("bar.sync 0;", ""),
    "written that another warp read": SWAPPED + "st.shared.b32 [%r2], %r6;",
    "written that another warp wrote": "st.shared.b32 [%r2], %r1; st.shared.b32 [%r4], %r1;",
    "different values": "st.shared.b32 [0], %r3;",
    "may still be arriving": COPIED.replace("cp.async.wait_group 0;", ""),
    "may still be arriving.": COPIED.replace("wait_group 0", "wait_group 1"),
    "read that another warp wrote.": COPIED.replace("bar.sync 0;", ""),
    "only a part of a warp": "setp.lt.u32 %p1, %r1, 5; @%p1 bra $here; bra.uni $end; $here: bar.sync 0; $end:",
    "only a part of a warp is here": "setp.lt.u32 %p1, %r1, 5; @%p1 shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;",
    "different barriers": "setp.lt.u32 %p1, %r1, 32; @%p1 bra $a; bar.sync 0; bra.uni $end; $a: bar.sync 0; $end:",
    "not known here": "popc.b32 %r5, %r1;",
    "part of its bytes": "mov.u32 %r5, 2; cp.async.ca.shared.global [%r2], [%rd2], 4, %r5;",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_noticed(what: str) -> None:
    with pytest.raises(PtxError, match=what.rstrip(".")):
        run(WRONG[what])


def test_programs_are_never_in_order() -> None:
    write = "mov.u32 %r5, %ctaid.x; st.global.b32 [%rd2], %r5;"
    assert run(write).tolist() == [0] * 64
    with pytest.raises(PtxError, match="different values"):
        run(write, programs=2)
    with pytest.raises(PtxError, match="written that another warp wrote"):
        run("st.global.b32 [%rd2], %r1;", programs=PROGRAMS_AT_ONCE + 1)
    with pytest.raises(PtxError, match="written that another program read"):
        run("ld.global.b32 %r5, [%rd2]; bar.sync 0; st.global.b32 [%rd2], %r5;", programs=2)


def test_tensors_are_apart() -> None:
    """A read behind one tensor that falls into the next one is noticed all the same."""
    whole = torch.arange(128, dtype=torch.int32)
    first, second = whole[:64], whole[64:]
    kernel = Compiler(KERNEL.format(body="ld.global.b32 %r5, [%rd2+4];"))
    with pytest.raises(PtxError, match="outside of all tensors"):
        launch(kernel, (1, 1, 1), [first.data_ptr()], [first, second[1:]], 0)


def test_tensor_cores_read_what_is_fenced() -> None:
    """128 threads; of a descriptor of 64 bytes' swizzle what they read is what was stored."""
    product = """
    st.shared.b32 [%r2], 0;
    {fence}
    bar.sync 0;
    mov.b64 %rd4, 0x8000004000010000;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r10,%r11,%r12,%r13}}, {{%r3,%r3,%r3,%r3}}, %rd4, 0, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.global.b32 [%rd2], %r10;
    """
    for fence, noticed in (("fence.proxy.async.shared::cta;", False), ("", True)):
        text = KERNEL.format(body=product.format(fence=fence)).replace(".reqntid 64", ".reqntid 128")
        tensor = torch.ones(128, dtype=torch.int32)
        arguments = Compiler(text), (1, 1, 1), [tensor.data_ptr()], [tensor], 512
        if noticed:
            with pytest.raises(PtxError, match="no fence between"):
                launch(*arguments)
        else:
            launch(*arguments)
            assert not tensor.any()
