"""Files of rows: every kind says the same, and what can't be read is one row's affair where it is."""

from __future__ import annotations

import json

import pytest

from moe_sampler import SamplingPlan
from moe_sampler.rows.batches import Picture, Run, queues_of, unfinished, units_of
from moe_sampler.rows.files import read_rows

ROWS = [{"prompt": "a castle, at dusk", "seed": 3}, {"prompt": 'a "portrait"', "seed": None}]


def written(tmp_path, kind: str):
    path = tmp_path / f"rows{kind}"
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    elif kind == ".csv":
        path.write_text('\ufeffprompt,seed\r\n"a castle, at dusk",3\r\n"a ""portrait""",\r\n', newline="")
    else:
        table = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(table.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_says_the_same(tmp_path, kind):
    rows, columns = read_rows(written(tmp_path, kind))
    assert columns == ["prompt", "seed"] and [row.number for row in rows] == [1, 2]
    assert [str(row.cells["prompt"]) for row in rows] == [row["prompt"] for row in ROWS]
    assert int(rows[0].cells["seed"]) == 3 and "seed" not in rows[1].cells, "what is empty isn't there"


def test_a_text_has_a_prompt_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("a castle\r\n\r\n  ein Schloß \r\n".encode())
    rows, columns = read_rows(tmp_path / "a.txt")
    assert columns == ["prompt"]
    assert [(r.number, r.place, r.cells["prompt"]) for r in rows] == [
        (1, "a.txt:1", "a castle"),
        (2, "a.txt:3", "ein Schloß"),
    ]


def test_a_damaged_line_is_a_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n[1]\n{"prompt": "y"}\n')
    rows, _ = read_rows(tmp_path / "a.jsonl")
    assert [row.problem is None for row in rows] == [True, False, False, True]
    assert "no JSON" in rows[1].problem and "no JSON object" in rows[2].problem
    (tmp_path / "a.csv").write_text("prompt,seed\nx,1,2\ny,2\n")
    rows, _ = read_rows(tmp_path / "a.csv")
    assert [row.problem is None for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", b"prompt,prompt\nx,y\n", "two columns"),
        ("a.txt", b"\xff\xfex\0", "UTF-16"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.xlsx", b"", "prompts are read from"),
        ("a.jsonl", b"\n", "no rows"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path, name, data, said):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=said):
        read_rows(tmp_path / name)


def pictures(count: int, runs: int = 1) -> list[Picture]:
    shared = [Run({}, {}, SamplingPlan((), 1.0)) for _ in range(runs)]
    return [Picture(i + 1, "", f"{i}.png", shared[i % runs], {}, {}) for i in range(count)]


def names(queues) -> list[list[int]]:
    return [[picture.row for picture in queue] for queue in queues]


def test_batches_are_the_files_whatever_is_finished():
    alone = names(queues_of(pictures(7, runs=2), 2))
    assert alone == [[1, 3], [2, 4], [5, 7], [6]], "a batch has one plan"
    together = queues_of(pictures(7, runs=2), 2, together=5)
    assert names(together) == [[1, 3, 5, 7], [2, 4, 6]], "as many whole batches as fit"
    left = unfinished(together[0], 2, lambda picture: picture.row in (1, 3, 5))
    assert [picture.row for picture in left] == [5, 7], "a batch that lacks a picture is made as it was"
    shards = units_of(pictures(7, runs=2), 2, shard_size=3)
    assert [(unit.shard, names(unit.queues)) for unit in shards] == [
        (0, [[1, 3], [2]]),
        (1, [[4, 6], [5]]),
        (2, [[7]]),
    ], "no batch in two shards"
