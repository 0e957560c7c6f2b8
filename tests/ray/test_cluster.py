"""A Ray cluster of this machine: two workers, of which one is killed half-way."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from moe_sampler import HybridPipeline
from moe_sampler.cli import app
from moe_sampler.cli.asked import Asked
from moe_sampler.data.scenes import DemoScenes
from moe_sampler.demo import experts_path
from moe_sampler.ray import GenerateImages
from moe_sampler.tinyflux import ExtractFeatures

pytestmark = pytest.mark.processes

COUNT = 6
SETTINGS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray.data", reason="the extra ray isn't installed")
    import ray

    before = dict(os.environ)
    # Workers are nice by 15, which is for ever beside other tests; the dashboard is nobody's here.
    os.environ |= {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
    )
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import tests
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()
    os.environ.clear()
    os.environ |= before


def die_once(mark: Path) -> None:
    """The process that comes here first is killed."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Dies:
    """As `GenerateImages`, in a worker that is killed in its second batch."""

    def __init__(self, mark: Path, kind: type, **settings) -> None:
        self._mark, self._images, self._batches = mark, kind(**settings), 0

    def __call__(self, batch):
        self._batches += 1
        if self._batches == 2:
            die_once(self._mark)
        return self._images(batch)


def test_all_rows_once_though_a_worker_is_killed(cluster, tmp_path):
    rows = [{"prompt": "a castle", "seed": i, "handoff": 0.8, "id": f"x{i}"} for i in range(COUNT)]
    made = (
        cluster.data.from_items(rows, override_num_blocks=COUNT)
        .map_batches(
            Dies,
            fn_constructor_args=(tmp_path / "mark", GenerateImages),
            fn_constructor_kwargs={"columns": ["handoff"], "settings": SETTINGS, "batch_size": 1},
            batch_size=1,
            compute=cluster.data.ActorPoolStrategy(size=2),
        )
        .take_all()
    )
    assert (tmp_path / "mark").exists()
    assert sorted(row["id"] for row in made) == [f"x{i}" for i in range(COUNT)]
    pipe = HybridPipeline.from_pretrained(experts_path())
    for row in made:
        alone = pipe("a castle", seed=int(row["seed"]), handoff=0.8, **SETTINGS).images[0]
        assert row["error"] is None
        assert (np.asarray(Image.open(io.BytesIO(row["image"]))) == np.asarray(alone)).all()


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_commands_rows_over_the_cluster_are_the_same_files(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a castle\na portrait\na castle at dusk\n")
    arguments = ("generate", "--prompts", "p.txt", "--steps", 2, "--batch-size", 2, "--output-dir")
    own = HybridPipeline.from_pretrained(experts_path())
    with monkeypatch.context() as patched:
        patched.setattr(Asked, "load", lambda self: own)
        run(*arguments, "alone")
    assert "3 pictures" in run(*arguments, "out", "--ray", "auto", "--ray-workers", 1).stdout
    assert contents(Path("out")) == contents(Path("alone"))


def test_a_students_cache_on_the_cluster_is_the_same_files(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--demo", "--count", 4, "--shard-size", 2, "--buckets", "0.5")
    run("tinyflux", "cache", "alone", *arguments)
    assert "4 samples in 2 shards" in run("tinyflux", "cache", "out", *arguments, "--ray", "auto").stdout
    assert contents(Path("out")) == contents(Path("alone"))
    assert "for --ray" in run("tinyflux", "cache", "x", "--demo", "--ray-workers", 2, code=2).stderr

    # and of rows that Ray reads and writes
    scenes = [DemoScenes(4)[i] for i in range(4)]
    rows = [{"image": np.asarray(s.image), "text": s.caption, "seed": i} for i, s in enumerate(scenes)]
    order = cluster.data.DataContext.get_current().execution_options
    monkeypatch.setattr(order, "preserve_order", True)
    cluster.data.from_items(rows, override_num_blocks=2).map_batches(
        ExtractFeatures,
        fn_constructor_kwargs={"t_buckets": [0.5]},
        batch_size=2,
        compute=cluster.data.ActorPoolStrategy(size=1),
    ).write_parquet(str(tmp_path / "rows"))
    run("tinyflux", "import", "made", "rows", "--shard-size", 2)
    shards = {name: data for name, data in contents(Path("made")).items() if name.startswith("shard")}
    assert len(shards) == 2 and shards.items() <= contents(Path("alone")).items()
