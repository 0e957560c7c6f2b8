"""The students' study on random ones: who is painted from what, measured, kept, shown."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import student_quality, student_study
from bench.demo import evaluate
from bench.demo.evaluator import new_evaluator
from bench.demo.report import measured
from bench.student_study import ROWS, Painter, Sampling, Student, all_students, find_students
from moe_sampler.demo.data import HELD_OUT_FIRST, SceneSet
from moe_sampler.tinyflux import StudentPipeline, TinyFlux, TinyFluxConfig
from moe_sampler.tinyflux.training.settings import StudentSettings
from moe_sampler.training.settings import from_tables, read_toml

pytestmark = pytest.mark.usefixtures("one_thread")

SCENES, COUNT = 12, 4


def student(folder, seed, training=None):
    torch.manual_seed(seed)
    model = TinyFlux(TinyFluxConfig.demo(num_double_layers=0, num_single_layers=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if training is not None:
        (folder / "diffusion_pytorch_model.safetensors").rename(folder / "model.safetensors")
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in training))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of three variants, trained for equal time; the baseline's weights are in both sets."""
    root = tmp_path_factory.mktemp("study")
    for i, variant in enumerate(("alone", "features", "distilled")):
        for seed in (0, 1):
            log = [{"step": 50, "seconds": 20.0}, {"step": 50, "validation": {}}]
            log += [{"step": 100 - 10 * i, "seconds": 40.0 + seed}]
            student(root / "equal_steps" / f"{variant}-{seed}", 10 * i + seed, log)
            other = 10 * i + seed + (0 if variant == "alone" else 5)
            student(root / "equal_time" / f"{variant}-{seed}", other)
    return root


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    SceneSet(folder / "scenes", SCENES, HELD_OUT_FIRST).render(workers=1)
    return folder


@pytest.fixture(scope="module")
def referee(work_dir, demo_pipeline):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "train_evaluator", lambda scenes, folder: new_evaluator())
        return evaluate.Referee.prepare(work_dir, demo_pipeline.vae, COUNT, SCENES)


@pytest.fixture
def painter(demo_pipeline, referee, runs):
    return Painter(demo_pipeline, referee.prompts, Sampling(steps=2), 4, runs / "pictures")


def test_the_referee_knows_the_real_pictures(referee):
    """The reference is the other scenes through the autoencoder: against itself nothing is off."""
    assert len(referee.prompts) == COUNT and len(referee.reconstructions) == SCENES
    renders, through = (
        referee.measure(referee.real["renders"]),
        referee.measure(referee.real["reconstructions"]),
    )
    shares = {"attributes", "composition", "surface"}
    assert renders.keys() == shares | {"frechet", "high_frequencies", "patches"}
    tally = referee.by_attribute(referee.real["renders"])
    assert sum(count for _, count in tally.values()) == COUNT + sum(map(len, referee.test.prompts()[1]))
    assert (
        sum(right for right, _ in tally.values()) / sum(c for _, c in tally.values()) == renders["attributes"]
    )
    # The autoencoder loses texture.
    assert through["high_frequencies"] < renders["high_frequencies"]
    half = evaluate.Referee(
        referee.judge, referee.test, np.tile(referee.reconstructions[:COUNT], (2, 1, 1, 1, 1)[:4])
    )
    own = half.measure(half.real["reconstructions"])
    assert own["frechet"] == pytest.approx(0, abs=1e-6) and own["high_frequencies"] == pytest.approx(1)
    assert own["patches"] < 0.2 * through["patches"] + 1e-9


def test_a_student_is_painted_as_the_pipeline_paints_it(painter, runs, referee, demo_pipeline):
    found = find_students(runs / "equal_steps")
    assert [(s.variant, s.seed) for s in found][:3] == [("alone", 0), ("alone", 1), ("distilled", 0)]
    pipe = StudentPipeline.from_pretrained(found[1].folder, demo_pipeline)
    pipe.set_progress_bar_config(disable=True)
    keys = {"num_inference_steps": 2, "guidance_scale": 2.5, "output_type": "np"}
    for guided, weights in ((False, {}), (True, {"sol_weight": 0.5, "lune_weight": 0.5})):
        images = painter.of_student(found[1], guided)
        one = pipe(referee.prompts[2], seed=1_000_002, **keys, **weights).images[0]
        assert images.dtype == np.uint8 and images.shape == (COUNT, 64, 64, 3)
        assert np.abs(images[2].astype(int) - one * 255).max() <= 1.5


def test_pictures_are_painted_once(painter, runs, monkeypatch):
    found = {s.folder.name: s for s in find_students(runs / "equal_steps")}
    images = painter.of_student(found["alone-0"], False)
    monkeypatch.setattr(Painter, "_paint", lambda *args: np.zeros(1))
    again = Painter(painter.experts, painter.prompts, painter.sampling, 2, painter.kept)
    same = Student(runs / "equal_time" / "alone-0", "alone", 0)
    assert (again.of_student(found["alone-0"], False) == images).all()
    assert (again.of_student(same, False) == images).all()  # the same weights
    for sampling in (Sampling(steps=3), Sampling(steps=2, guidance=3.0)):
        other = Painter(painter.experts, painter.prompts, sampling, 4, painter.kept)
        assert other.of_student(found["alone-0"], False).shape == (1,)
    changed = Student(runs / "equal_time" / "features-0", "features", 0)
    assert painter.of_student(changed, False).shape == (1,)


def test_the_command(runs, work_dir, referee, tmp_path, monkeypatch):
    page, picture = tmp_path / "PAGE.md", tmp_path / "x.png"
    page.write_text("before\n<!-- measured: quality -->\nold\n<!-- end: quality -->\nafter")
    for name, value in (("PAGE", page), ("PICTURE", picture), ("RESULTS", tmp_path)):
        monkeypatch.setattr(student_quality, name, value)
    monkeypatch.setattr(student_quality.Referee, "prepare", lambda *args: referee)
    monkeypatch.setattr(evaluate, "patch_distance", partial(evaluate.patch_distance, patches=500))
    runs = shutil.copytree(runs, tmp_path / "runs", ignore=shutil.ignore_patterns("pictures"))
    arguments = [str(runs), "--work-dir", str(work_dir), "--steps", "2", "--count", str(COUNT)]
    student_quality.main([*arguments, "--paint", "features-1"])
    assert page.read_text().count("old") == 1 and not picture.exists()
    # The baseline's weights are those of the other set, but not features'.
    assert len(list((runs / "pictures").glob("features-1-*.npy"))) == 2
    student_quality.main(arguments)
    result = json.loads((tmp_path / "student_quality.json").read_text())
    assert result["settings"] == {
        "steps": 2,
        "guidance": 2.5,
        "sol_weight": 0.5,
        "lune_weight": 0.5,
        "count": COUNT,
    }
    assert list(result["equal_steps"]) == [row.title for row in ROWS]
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text
    for name in ("equal_steps", "equal_time"):
        for title, rows in result[name].items():
            assert [run["seed"] for run in rows] == [0, 1]
            assert f"| {title} | " in text and measured(rows)[1] in text and "±" in measured(rows)[1]
    assert "| TinyFlux alone | 100 | " in text
    assert (
        result["equal_time"]["TinyFlux alone"][0]["patches"]
        == result["equal_steps"]["TinyFlux alone"][0]["patches"]
    )
    with Image.open(picture) as sheet:
        assert sheet.width > 64 * 3 and sheet.height > 64 * (len(ROWS) + 2)


def test_refusals(tmp_path, runs):
    with pytest.raises(ValueError, match="holds neither equal_steps/ nor equal_time/"):
        all_students(tmp_path)
    (tmp_path / "best-0").mkdir()
    with pytest.raises(ValueError, match="call students VARIANT-SEED"):
        find_students(tmp_path)
    (tmp_path / "best-0").rename(tmp_path / "alone-0")
    with pytest.raises(ValueError, match="every variant needs the same seeds"):
        find_students(tmp_path)
    with pytest.raises(ValueError, match=r"one \.safetensors file, got 0"):
        _ = Student(tmp_path / "alone-0", "alone", 0).weights
    with pytest.raises(ValueError, match="no student alone-9"):
        student_study.paint(runs, None, ["alone-9"])
    with pytest.raises(SystemExit):
        student_quality.main([str(runs), "--work-dir", str(tmp_path), "--count", "1"])


def test_the_studys_settings_are_settings():
    found = from_tables(
        StudentSettings, read_toml(Path(__file__).parents[2] / "bench" / "student_study.toml")
    )
    assert found.training.max_train_steps == 1000 and found.objective.distill_weight == 0
