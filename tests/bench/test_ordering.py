"""What `bench.ordering` finds in PTX written by hand."""

import pytest

from bench.ordering import accesses_in_order, unfenced_reads

LOOP = """
	fence.proxy.async.shared::cta;
$L__BB0_1:
	cp.async.wait_group 	0;
	bar.sync 	0;
	{FENCE}
	wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {{%r1}}, %rd1, %rd2;
	@%p1 bra 	$L__BB0_1;
	ret;
"""
BACK = """
	wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%r1}, %rd1, %rd2;
	bra.uni 	$L__BB0_2;
$L__BB0_1:
	tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p1;
	ret;
$L__BB0_2:
	cp.async.wait_group 	1;
	@!%p1 bra 	$L__BB0_4;
	fence.proxy.async.shared::cta;
$L__BB0_4:
	bra.uni 	$L__BB0_1;
"""
ACCESSES = """
	ld.param.b64 	%rd1, [_kernel_param_0];
	ld.param.b64 	%rd2, [_kernel_param_1];
	mad.wide.s32 	%rd3, %r1, 4, %rd2;
	add.s64 	%rd4, %rd3, 16;
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd4 + 0 ];
	ld.global.b64 %rd5, [ %rd1 + 0 ];
	bar.sync 	0;
	@%p1 st.global.v4.b32 [ %rd3 + 0 ], { %r1, %r2, %r3, %r4 };
	st.global.b64 [ %rd1 + 0 ], %rd3;
"""


@pytest.mark.parametrize("fence, unfenced", [("", 1), ("fence.proxy.async.shared::cta;", 0)])
def test_a_fence_before_the_wait_does_not_count(fence, unfenced):
    assert unfenced_reads(LOOP.format(FENCE=fence)) == unfenced


def test_every_path_counts():
    assert unfenced_reads(BACK) == 1
    assert unfenced_reads(BACK.replace("@!%p1 bra \t$L__BB0_4;", "")) == 0
    assert unfenced_reads(BACK.replace("cp.async", "none")) == 0


def test_accesses_by_parameter():
    assert accesses_in_order(ACCESSES, 0) == "l|s"
    assert accesses_in_order(ACCESSES, 1) == "l|s"
    assert accesses_in_order(ACCESSES.replace("bar.sync 	0;", ""), 1) == "ls"
    assert accesses_in_order(ACCESSES, 2) == "|"
