"""Writes to what a product of the tensor cores still reads are found: no GPU here, where they made sums NaN."""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton has no wheels but for Linux", allow_module_level=True)

from refgrid_solutions.grouped_attention.backends.triton.in_flight import from_registers, overwritten

# What Triton 3.6.0 made of a loop in which the weights of the step before are multiplied, cut to a few registers.
LATE = """
$L__BB0_2:                              // %__nv_exp2f.exit
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r17,%r18}, %rd10, %rd11, 0, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r175,%r176}, {%r208,%r209}, %rd19, %p13, 1, 1, 1;
	wgmma.commit_group.sync.aligned;
	ex2.approx.ftz.f32 	%r68, %r17;
	ex2.approx.ftz.f32 	%r69, %r18;
	cvt.rn.bf16x2.f32 	%r208, %r69, %r68;
	@%p24 bra 	$L__BB0_2;
	wgmma.wait_group.sync.aligned 0;
	mov.b32 	%r209, 0;
	ret;
"""
WRITE = "cvt.rn.bf16x2.f32 \t%r208, %r69, %r68;"


def test_weights_of_the_next_block_in_registers_of_a_product_are_found() -> None:
    assert from_registers(LATE) == 1
    assert overwritten(LATE) == [WRITE]


@pytest.mark.parametrize(
    "instead",
    [
        f"wgmma.wait_group.sync.aligned 0;\n\t{WRITE}",
        "cvt.rn.bf16x2.f32 \t%r210, %r208, %r68;",
        "st.shared.b32 \t[%r208], %r68;",
    ],
    ids=["waited for", "read", "an address"],
)
def test_what_is_safe_is_not_found(instead: str) -> None:
    assert overwritten(LATE.replace(WRITE, instead)) == []


def test_what_is_carried_may_be_copied_first() -> None:
    """As Triton 3.9.0 does."""
    copied = LATE.replace("{%r208,", "{%r67,").replace("\twgmma.fence", "\tmov.b32 %r67, %r208;\n\twgmma.fence")

    assert overwritten(copied) == ["mov.b32 %r67, %r208;"]  # the first of the two, in the next step
    assert overwritten(copied.replace("\tmov.b32 %r67, %r208;\n", "", 1)) == []


@pytest.mark.parametrize(
    "write",
    [
        f"wgmma.wait_group.sync.aligned 1;\n\t{WRITE}",
        f"@%p25 bra \t$L__BB0_3;\n\tret;\n$L__BB0_3:\n\t{WRITE}",
        "@%p25 mov.b64 \t{%r5, %r209}, %rd3;",
        "elect.sync \t%r208|%p34, -1;",
    ],
    ids=["not all waited for", "behind a jump", "one of two", "with a predicate"],
)
def test_any_write_before_the_wait_for_all_is_found(write: str) -> None:
    assert overwritten(LATE.replace(WRITE, write)) == [write.splitlines()[-1].strip()]


def test_a_write_in_the_next_step_is_found() -> None:
    later = LATE.replace(f"\t{WRITE}\n", "").replace("\twgmma.fence", f"\t{WRITE}\n\twgmma.fence", 1)

    assert overwritten(later) == [WRITE]
