"""What the tests of elementwise operations share: sizes around every boundary of a kernel's blocks."""

import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    pytest.param((3,), id="one number a sample"),
    pytest.param((1, 1), id="one element"),
    pytest.param((3, 5), id="smaller than a vector"),
    pytest.param((2, 4, 8, 8), id="smaller than a block"),
    pytest.param((1, 4, 16, 16), id="exactly one block"),
    pytest.param((2, 1021), id="prime"),
    pytest.param((3, 3, 37, 11), id="odd, more than a block, several samples"),
    pytest.param((2, 1040), id="multiple of 16, not of a block"),
    pytest.param((2, 4, 32, 32), id="several blocks"),
]


def randn(generator, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(dtype)
