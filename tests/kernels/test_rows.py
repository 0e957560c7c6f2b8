import math
import subprocess
import sys
from pathlib import Path

import pytest

from moe_sampler.kernels import rows


def test_a_row_starts_on_a_vector_boundary():
    assert rows.ROW_WIDTH * 4 % 16 == 0
    assert len(rows.COLUMNS) == len(set(rows.COLUMNS)) <= rows.ROW_WIDTH


def test_make_row_places_columns_by_name():
    row = rows.make_row(p=1, scale_1=2, q_uncond_0=3)
    assert len(row) == rows.ROW_WIDTH
    assert (
        row[rows.INDEX["p"]] == 1 and row[rows.INDEX["scale_1"]] == 2 and row[rows.INDEX["q_uncond_0"]] == 3
    )
    assert row[rows.INDEX["clip"]] == math.inf
    assert sum(value != 0 for value in row) == 4


def test_make_row_knows_its_columns():
    with pytest.raises(ValueError, match="unknown column 'q'"):
        rows.make_row(q=1)


@pytest.mark.parametrize("wrong", [{"a": math.nan}, {"scale_1": math.inf}, {"clip": math.nan}, {"clip": -1}])
def test_a_row_of_numbers_that_no_step_has_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"got {name} = "):
        rows.make_row(p=1, **wrong)


def test_the_layout_needs_no_torch():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert 'torch' not in sys.modules"
    path = Path(rows.__file__)
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
