"""The GPU in NumPy itself, on PTX written by hand."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from .emulator import Launch, parse

HEAD = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 a,
    .param .u64 .ptr .global .align 1 b
)
.reqntid {threads}
{{
    .reg .b32 %r<99>;
    ld.param.b64 %rd1, [a];
    ld.param.b64 %rd2, [b];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    setp.eq.b32 %p1, %r1, 0;
    setp.eq.b32 %p2, %r2, 0;
    mad.wide.s32 %rd3, %r1, 4, %rd1;
    mad.wide.s32 %rd4, %r1, 4, %rd2;
{body}
    ret;
}}
"""


def run(body: str, a: Any, b: Any, threads: int = 64, programs: int = 1) -> None:
    text = HEAD.format(threads=threads, body=body)
    Launch(parse(text), (programs, 1, 1), [a, b], programs).run()


def numbers(count: int = 64) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def swapped(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16).view(-1, 2).flip(1).reshape(-1).view(torch.int32)


def chosen(x: torch.Tensor) -> torch.Tensor:
    return 6 - 2 * (x < 3).int()


def through_bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def square_plus(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.double() * x.double() + y.double()).float()


NARROW = "%rd9, %rd9, 32;\ncvt.u32.u64 %r9, %rd9;"
EXTRACTED = "%rd9, %rd9, 9, 40;\ncvt.u32.u64 %r9, %rd9;"
PAIR = "cvt.rn.bf16x2.f32 %r7, %r8, 0f3F800000;\nmov.b32 {%rs1, %rs2}, %r7;\n"
COMPUTED = [
    ("add.s32 %r9, %r8, 7;", lambda x: x + 7),
    ("sub.s32 %r9, 7, %r8;", lambda x: 7 - x),
    ("neg.s32 %r9, %r8;", lambda x: -x),
    ("not.b32 %r9, %r8;", lambda x: ~x),
    ("mul.lo.s32 %r9, %r8, -3;", lambda x: x * -3),
    ("mul.hi.s32 %r9, %r8, 1402438301;", lambda x: (x.long() * 1402438301 >> 32).int()),
    ("mad.lo.s32 %r9, %r8, 5, %r8;", lambda x: x * 6),
    ("div.s32 %r9, %r8, 7;", lambda x: torch.div(x, 7, rounding_mode="trunc")),
    ("rem.s32 %r9, %r8, 7;", lambda x: torch.fmod(x, 7)),
    ("shl.b32 %r9, %r8, 3;", lambda x: x << 3),
    ("shl.b32 %r9, %r8, 32;", torch.zeros_like),
    ("shr.s32 %r9, %r8, 2;", lambda x: x >> 2),
    ("shr.s32 %r9, %r8, 40;", lambda x: x >> 31),
    ("shr.u32 %r9, %r8, 31;", lambda x: (x < 0).int()),
    ("bfe.u32 %r9, %r8, 2, 3;", lambda x: x >> 2 & 7),
    ("bfe.s32 %r9, %r8, 0, 4;", lambda x: (x & 7) - (x & 8)),
    ("min.s32 %r9, %r8, 5;", lambda x: x.clamp(max=5)),
    ("max.s32 %r9, %r8, -5;", lambda x: x.clamp(min=-5)),
    ("setp.lt.s32 %p5, %r8, 3;\nselp.b32 %r9, 1, 2, %p5;", lambda x: 2 - (x < 3).int()),
    ("mov.b32 %r9, 4;\nsetp.lt.s32 %p5, %r8, 3;\n@!%p5 mov.b32 %r9, 6;", chosen),
    ("add.s16x2 %r9, %r8, %r8;", lambda x: (x.view(torch.int16) * 2).view(torch.int32)),
    ("mov.b32 {%rs1, %rs2}, %r8;\nmov.b32 %r9, {%rs2, %rs1};", swapped),
    ("prmt.b32 %r9, %r8, %r8, 0x1032;", swapped),
    ("prmt.b32 %r9, %r8, 7, 0xBBB4;", lambda x: torch.where(x < 0, 7 - 256, 7).int()),
    ("shfl.sync.bfly.b32 %r9, %r8, 5, 31, -1;", lambda x: x[torch.arange(64) ^ 5]),
    (f"cvt.s64.s32 %rd9, %r8;\nshr.s64 {NARROW}", lambda x: x >> 31),
    (f"cvt.s64.s32 %rd9, %r8;\nbfe.s64 {EXTRACTED}", lambda x: x >> 9),
    (f"mul.wide.s32 %rd9, %r8, %r8;\nshr.u64 {NARROW}", lambda x: (x.long() ** 2 >> 32).int()),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), COMPUTED, ids=[body for body, _ in COMPUTED])
def test_integers_compute_as_the_manual_says(body: str, expected: Any) -> None:
    x = numbers() * 77_777_777 + torch.iinfo(torch.int32).min  # overflows, and is often negative
    x[:8] = torch.tensor([0, 1, -1, 7, -8, 8, 2**31 - 1, -(2**31)])
    y = torch.zeros_like(x)
    run(f"ld.global.b32 %r8, [%rd3];\n{body}\nst.global.b32 [%rd4], %r9;", x, y)
    assert y.tolist() == expected(x).tolist()


TINY = torch.finfo(torch.float32).tiny
# Of a pair of %r8 and one, and another pair; the lower of the results, then the higher.
PAIRS = "mov.b64 %rd7, {{%r8, 0f3F800000}};\nmov.b64 %rd8, {{0f40400000, %r8}};\n{};\n".format
LOWER, HIGHER = "mov.b64 {%r9, %r7}, %rd9;", "mov.b64 {%r7, %r9}, %rd9;"
BFLOAT, HALF = "cvt.rn.bf16.f32 %rs1, %r8;\n", "cvt.rn.f16.f32 %rs1, %r8;\n"
THREE = torch.tensor(3.0)
WHERE = "%p5, %r8, %r8;\nselp.f32 %r9, 0f3F800000, %r8, %p5;"
FLOATS = [
    ("add.f32 %r9, %r8, 0f3F800000;", lambda x: x + 1),
    ("mul.f32 %r9, %r8, %r8;", lambda x: x * x),
    ("neg.f32 %r9, %r8;", lambda x: -x),
    ("fma.rn.f32 %r9, %r8, %r8, %r8;", lambda x: square_plus(x, x)),
    ("div.rn.f32 %r9, %r8, 0f40400000;", lambda x: x / 3),
    ("div.rn.ftz.f32 %r9, %r8, 0f40400000;", lambda x: torch.where(x.abs() < TINY, x * 0, x) / 3),
    ("div.full.f32 %r9, %r8, %r8;", lambda x: x / x * (1 + 2.0**-22)),
    ("sqrt.rn.f32 %r9, %r8;", lambda x: x.double().sqrt().float()),
    ("max.f32 %r9, %r8, 0f00000000;", lambda x: torch.fmax(x, torch.zeros(()))),
    ("max.NaN.f32 %r9, %r8, 0f00000000;", lambda x: torch.maximum(x, torch.zeros(()))),
    (f"setp.ne.f32 {WHERE}", lambda x: x),
    (f"setp.neu.f32 {WHERE}", lambda x: torch.where(x.isnan(), 1.0, x)),
    (BFLOAT + "cvt.f32.bf16 %r9, %rs1;", through_bfloat16),
    (HALF + "cvt.f32.f16 %r9, %rs1;", lambda x: x.half().float()),
    (PAIR + "cvt.f32.bf16 %r9, %rs2;", through_bfloat16),
    (PAIR + "cvt.f32.bf16 %r9, %rs1;", torch.ones_like),
    (BFLOAT + "add.rn.f32.bf16 %r9, %rs1, %r8;", lambda x: through_bfloat16(x) + x),
    (HALF + "sub.rn.f32.f16 %r9, %rs1, %r8;", lambda x: x.half().float() - x),
    (PAIRS("add.f32x2 %rd9, %rd7, %rd8") + LOWER, lambda x: x + 3),
    (PAIRS("sub.rn.f32x2 %rd9, %rd7, %rd8") + HIGHER, lambda x: 1 - x),
    (PAIRS("mul.f32x2 %rd9, %rd7, %rd8") + LOWER, lambda x: x * 3),
    (PAIRS("fma.rn.f32x2 %rd9, %rd7, %rd7, %rd8") + LOWER, lambda x: square_plus(x, THREE)),
    (PAIRS("fma.rn.f32x2 %rd9, %rd7, %rd7, %rd8") + HIGHER, lambda x: 1 + x),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), FLOATS, ids=[body for body, _ in FLOATS])
def test_floats_compute_as_torch_does(body: str, expected: Any) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 100
    x[:8] = torch.tensor([0.0, -0.0, 1.0, float("nan"), torch.inf, -torch.inf, 1e-40, 70000.0])
    y = torch.zeros_like(x)
    run(f"ld.global.b32 %r8, [%rd3];\n{body}\nst.global.b32 [%rd4], %r9;", x, y)
    torch.testing.assert_close(y, expected(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pairs_of_halves_are_compared_each_for_itself(dtype: torch.dtype) -> None:
    x = torch.randn(128, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:4] = torch.tensor([float("nan"), -0.0, -torch.inf, torch.inf])
    kind = {torch.float16: "f16x2", torch.bfloat16: "bf16x2"}[dtype]
    y = torch.zeros(64, dtype=torch.int32)
    low, high = "selp.b32 %r9, 1, 0, %p5;", "selp.b32 %r10, 2, 0, %p6;"
    body = f"setp.le.{kind} %p5|%p6, %r8, %r11;\n{low}\n{high}\nadd.s32 %r9, %r9, %r10;"
    body = f"mov.b32 %r11, 0;\n{body}"
    run(f"ld.global.b32 %r8, [%rd3];\n{body}\nst.global.b32 [%rd4], %r9;", x.view(torch.int32), y)
    expected = (x <= 0).view(-1, 2).int() @ torch.tensor([1, 2], dtype=torch.int32)
    assert y.tolist() == expected.tolist()


def test_what_is_computed_has_one_nan() -> None:
    x = torch.tensor([0x7FC00001, -1, -(2**22)] + [0x7F800000] * 61, dtype=torch.int32)
    y = torch.zeros_like(x)
    run("ld.global.b32 %r8, [%rd3];\nsub.f32 %r9, %r8, %r8;\nst.global.b32 [%rd4], %r9;", x, y)
    assert y.tolist() == [0x7FFFFFFF] * 64


def test_vectors_are_moved_in_the_order_of_memory() -> None:
    x, y = numbers(256), torch.zeros(256, dtype=torch.int32)
    body = """
    mad.wide.s32 %rd5, %r1, 16, %rd1;
    mad.wide.s32 %rd6, %r1, 16, %rd2;
    ld.global.L1::evict_first.v4.b32 {%r4, %r5, %r6, %r7}, [%rd5 + 0];
    st.global.v4.b32 [ %rd6 ], {%r7, %r6, %r5, %r4};
    """
    run(body, x, y)
    assert y.tolist() == x.view(-1, 4).flip(1).reshape(-1).tolist()


def test_matrices_are_exchanged_as_the_manual_says() -> None:
    """Lane 4r + c holds halves 2c and 2c + 1 of row r, whose address is lane r's."""
    x, y = numbers(32), torch.zeros(32, dtype=torch.int32)
    body = """
    mad.lo.s32 %r5, %r1, 16, 1024;
    ld.global.b32 %r8, [%rd3];
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r5], {%r8};
    mad.lo.s32 %r6, %r1, 4, 1024;
    ld.shared.b32 %r9, [%r6];
    st.global.b32 [%rd4], %r9;
    """
    run(body, x, y, threads=32)
    assert y.tolist() == x.tolist()


SHARED = "mad.lo.s32 %r5, %r1, 4, 1024;\nst.shared.b32 [%r5], %r1;\n"
OTHER = "xor.b32 %r6, %r5, 128;\nld.shared.b32 %r7, [%r6];\nst.global.b32 [%rd4], %r7;\n"
# A thread's number reaches shared memory while it goes on.
ASYNC = """
    mad.lo.s32 %r5, %r1, 4, 1024;
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x4;
    cp.async.commit_group;
"""
WAIT = "cp.async.wait_group 0;\n"
SPIN = """
$again:
    @%p1 ld.global.gpu.acquire.b32 %r7, [%rd2];
    @%p1 st.shared.b32 [global_smem], %r7;
    bar.sync 0;
    ld.shared.b32 %r7, [global_smem];
    bar.sync 0;
    setp.eq.s32 %p4, %r7, 0;
    @%p4 bra $again;
"""
ANNOUNCE = "mov.b32 %r9, 1;\n@%p1 atom.global.gpu.release.add.u32 %r8, [%rd2], %r9;\n"
# The first program writes, the second reads what was written.
PASS = "not.pred %p3, %p2;\n@%p3 bra $second;\nst.global.b32 [%rd3], %r1;\n{}ret;\n$second:\n{}"
READ = "ld.global.b32 %r7, [%rd3];\n"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (SHARED + "bar.sync 0;\n" + OTHER, None),
        (SHARED + OTHER, "a read of shared memory races"),
        (SHARED + "bar.sync 0;\n" + OTHER + "st.shared.b32 [%r5], %r1;", "races with a read"),
        ("st.shared.b32 [global_smem], %r1;", "two writes of one instruction race"),
        ("st.global.b32 [%rd4 + 4], %r1;", "1 threads access memory outside"),
        ("st.global.b32 [%rd4 + -4], %r1;", "access memory outside"),
        ("st.global.b32 [%rd4 + 2], %r1;", "access memory outside|not aligned"),
        ("ld.global.v2.b32 {%r7, %r8}, [%rd3];", "access memory outside|not aligned"),
        ("st.global.b32 [%rd2], %r1;", "two writes of one instruction race"),
        ("xor.b32 %r5, %r1, 1;\nsetp.eq.b32 %p5, %r5, 0;\n@%p5 bra $end;\n$end:", "branch"),
        ("frobnicate.b32 %r5, %r1;", "frobnicate"),
        (ASYNC + WAIT + "bar.sync 0;\n" + OTHER, None),
        (ASYNC + WAIT + OTHER, "a read of shared memory races"),
        (ASYNC + OTHER + WAIT, "a read of shared memory races"),
        (ASYNC + "bar.sync 0;\n" + WAIT + OTHER, "a read of shared memory races"),
        (ASYNC + "bar.sync 0;\n" + OTHER + WAIT, "races with a read"),
        (SHARED + "bar.sync 0;\n" + OTHER + ASYNC + WAIT, "races with a read"),
    ],
)
def test_a_mistake_in_a_program_is_an_error(body: str, error: str | None) -> None:
    random.seed(0)
    x, y = numbers(), torch.zeros(64, dtype=torch.int32)
    if error is None:
        run(body, x, y)
        assert y.tolist() == [*range(32, 64), *range(32)]
        return
    with pytest.raises(
        (RuntimeError, IndexError, AssertionError, NotImplementedError), match=error
    ):
        run(body, x, y)


def test_a_warp_may_write_again_without_a_barrier() -> None:
    x, y = numbers(1024), torch.zeros(1024, dtype=torch.int32)
    read = "ld.shared.b32 %r7, [%r5];\nst.global.b32 [%rd4], %r7;\n"
    run(SHARED + SHARED + read, x, y, threads=1024)
    assert y.tolist() == x.tolist()


def test_a_copy_is_there_when_its_group_is_waited_for_and_not_before() -> None:
    x, y = numbers() + 7, torch.zeros(64, dtype=torch.int32)
    body = """
    setp.lt.s32 %p5, %r1, 40;
    selp.b32 %r6, 4, 0, %p5;
    mad.lo.s32 %r5, %r1, 4, 1024;
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x4, %r6;
    cp.async.commit_group;
    cp.async.ca.shared.global [ %r5 + 256 ], [ %rd3 + 0 ], 0x4, %r6;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.b32 %r7, [%r5 + {}];
    st.global.b32 [%rd4], %r7;
    """
    expected = [*range(7, 47), *[0] * 24]
    run(body.format(0), x, y)
    assert y.tolist() == expected
    run(body.format(256), x, y)
    assert not set(y.tolist()) & set(expected)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (PASS.format("bar.sync 0;\n" + ANNOUNCE, SPIN + READ), None),
        (PASS.format(ANNOUNCE, SPIN + READ), "a read races with a write"),
        (PASS.format("bar.sync 0;\n" + ANNOUNCE, READ), "races with"),
        (PASS.format("", SPIN + READ), "wait for each other forever"),
        (
            PASS.format("bar.sync 0;\n" + ANNOUNCE, SPIN.replace("acquire", "relaxed") + READ),
            "a read races with a write",
        ),
        (
            PASS.format("bar.sync 0;\n" + ANNOUNCE.replace("release", "relaxed"), SPIN + READ),
            "a read races with a write",
        ),
    ],
)
def test_programs_pass_on_what_is_released_and_acquired(
    body: str, error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.emulator.launch._PATIENCE", 2000)
    for seed in range(5):
        random.seed(seed)
        x, counter = torch.full((64,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        if error is None:
            run(body, x, counter, programs=2)
            assert x.tolist() == list(range(64))
        else:
            with pytest.raises(RuntimeError, match=error):
                run(body, x, counter, programs=2)


def test_what_was_never_written_is_not_zero() -> None:
    y = torch.zeros(64, dtype=torch.int32)
    run("st.global.b32 [%rd4], %r77;", numbers(), y)
    assert np.unique(y.numpy()).tolist() != [0]
