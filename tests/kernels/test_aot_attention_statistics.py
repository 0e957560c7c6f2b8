"""What Triton compiles for the attention statistics: no spills, wide accesses, once for all grids."""

import re

import pytest
import torch
from aot_helpers import aot, compilations, compiled_code, skip_unless_tuned

from bench.ordering import unfenced_reads
from moe_sampler.kernels.attention_launches import empty_parts, received_launch_of, rows_launch_of

pytestmark = compiled_code

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [8, 16, 40, 64, 80, 144, 160]


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(dtype, size, *, batch=2, heads=8, height=64, width=64, padding=0):
    """Both passes over views of [B, N, heads·size + padding]."""
    tokens = height * width
    q = empty(batch, tokens, heads * size + padding, dtype=dtype)[..., : heads * size]
    q = q.unflatten(-1, (heads, size)).transpose(1, 2)
    rows = empty(batch, heads, tokens)
    return (
        rows_launch_of(rows, rows, q, q, 0.1),
        received_launch_of(*empty_parts(q), rows, rows, q, q, width, 0.1),
    )


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_code(dtype, size, architecture):
    compiled = [(launch, aot.compile_launch(launch, architecture)) for launch in launches(dtype, size)]
    for _, code in compiled:
        assert not unfenced_reads(code.ptx), "tensor cores may read what is still being copied"
        tensor_cores = any(name in code.ptx for name in ("mma.sync", "wgmma", "tcgen05.mma"))
        assert tensor_cores == (dtype != torch.float32 or size <= 48)
    skip_unless_tuned()
    for launch, code in compiled:
        assert code.stack_bytes == 0 and code.spills == 0, str(code)
        assert code.registers > 32, "a kernel compiled to almost nothing"
        # q and k come in 128-bit pieces, through registers or asynchronous copies; what is loaded in smaller
        # ones is per query. A rest of 16 columns of 32 keys has only four numbers for each thread.
        copies = re.findall(r"LDGSTS\.\S+", code.sass)
        widths = {128, 64} if 0 < size % 32 <= 16 and dtype != torch.float32 else {128}
        narrow = [copy for copy in copies if not any(f".{bits}" in copy for bits in widths)]
        narrow_loads = sum(n for bits, n in code.global_loads.items() if bits not in widths)
        per_query = 0 if launch.kernel.__name__ == "softmax_rows_kernel" else 8
        assert len(narrow) + narrow_loads <= per_query, str(code)
        assert copies or code.global_loads.get(128), str(code)


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_sizes_do_not_spill_either(dtype, architecture):
    ragged = (*launches(dtype, 40, height=9, width=11), *launches(dtype, 20, height=5, padding=1))
    compiled = [aot.compile_launch(launch, architecture) for launch in ragged]
    for code in compiled:
        assert not unfenced_reads(code.ptx), "tensor cores may read what is still being copied"
    skip_unless_tuned()
    for code in compiled:
        assert code.stack_bytes == 0 and code.spills == 0, str(code)


def test_one_compilation_for_all_grids_batches_and_heads():
    # Triton specialises integers on 1 and on divisibility by 16: each of these would be a trap.
    grids = [launches(torch.float16, 40, height=h, width=w) for h, w in ((64, 64), (16, 32), (1, 64))]
    others = [launches(torch.float16, 40, batch=b, heads=h) for b, h in ((1, 1), (1, 8), (3, 5), (16, 16))]
    for passes in zip(*grids, *others, strict=True):
        assert compilations(passes) == 1
        wider = next(one for one in launches(torch.float16, 80) if one.kernel is passes[0].kernel)
        assert compilations([*passes, wider]) == 2, "the count counts"
