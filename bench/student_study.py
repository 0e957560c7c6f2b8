"""The students of a study, and the pictures each paints of the held-out prompts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.progress import track

from bench.demo.evaluate import Referee, generate, to_bytes
from moe_sampler import HybridPipeline
from moe_sampler.demo.data import write_array
from moe_sampler.tinyflux import StudentPipeline

SETS = {"equal_steps": "At equal steps", "equal_time": "At equal wall-clock time"}
VARIANTS = ("alone", "features", "distilled")


@dataclass(frozen=True)
class Row:
    """A line of the table: students of one variant, alone or beside the experts."""

    title: str
    variant: str
    guided: bool = False


ROWS = (
    Row("TinyFlux alone", "alone"),
    Row("+ Lune's and Sol's features", "features"),
    Row("+ routed velocity distillation", "distilled"),
    Row("+ guidance experts at sampling", "distilled", guided=True),
    Row("TinyFlux alone, with guidance experts", "alone", guided=True),
)
REAL = {"renders": "held-out renders", "reconstructions": "the same through the autoencoder"}
EXPERTS = "Sol and Lune, without a student"


@dataclass(frozen=True)
class Sampling:
    """How every picture is painted.

    Args:
        steps: of every run.
        guidance: classifier-free guidance scale of all.
        sol_weight, lune_weight: of the guidance experts, above and below the experts' own handoff.
    """

    steps: int = 12
    guidance: float = 2.5
    sol_weight: float = 0.5
    lune_weight: float = 0.5


@dataclass(frozen=True)
class Student:
    """A trained student of the study."""

    folder: Path
    variant: str
    seed: int

    @cached_property
    def weights(self) -> str:
        """SHA-256 of the weights' file."""
        files = list(self.folder.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(f"{self.folder} must hold one .safetensors file, got {len(files)}")
        return hashlib.sha256(files[0].read_bytes()).hexdigest()

    @cached_property
    def training(self) -> dict[str, float]:
        """Steps and seconds by the run's log, or {} without one."""
        path = self.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        timed = [record for record in map(json.loads, lines) if "seconds" in record]
        if not timed:
            return {}
        return {"steps": timed[-1]["step"], "seconds": sum(record["seconds"] for record in timed)}


def find_students(folder: Path) -> list[Student]:
    """The students of one set, every variant with the same seeds.

    Raises:
        ValueError: a folder by another name, or seeds that a variant lacks.
    """
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        match = re.fullmatch(rf"({'|'.join(VARIANTS)})-(\d+)", path.name)
        if match is None:
            raise ValueError(f"{path}: call students VARIANT-SEED, with VARIANT one of {', '.join(VARIANTS)}")
        found.append(Student(path, match[1], int(match[2])))
    seeds = {variant: sorted(s.seed for s in found if s.variant == variant) for variant in VARIANTS}
    if not found or len({tuple(own) for own in seeds.values()}) > 1:
        raise ValueError(f"{folder}: every variant needs the same seeds, and at least one, got {seeds}")
    return found


def all_students(runs: Path) -> dict[str, list[Student]]:
    """The students of every set there is."""
    students = {name: find_students(runs / name) for name in SETS if (runs / name).is_dir()}
    if not students:
        raise ValueError(f"{runs} holds neither {' nor '.join(f'{name}/' for name in SETS)}")
    return students


@dataclass(frozen=True)
class Painter:
    """Paints the prompts, or finds the pictures painted before.

    Args:
        experts: guide the students, and paint the row without one.
        prompts: image i of a seed starts from the same noise whoever paints.
        sampling: how.
        batch_size: pictures at once.
        kept: folder of the pictures.
    """

    experts: HybridPipeline
    prompts: Sequence[str]
    sampling: Sampling
    batch_size: int
    kept: Path

    def _pictures(self, name: str, key: Sequence[object], paint: Callable[[], np.ndarray]) -> np.ndarray:
        digest = hashlib.sha256(json.dumps([asdict(self.sampling), list(self.prompts), *key]).encode())
        path = self.kept / f"{name}-{digest.hexdigest()[:12]}.npy"
        if not path.exists():
            self.kept.mkdir(parents=True, exist_ok=True)
            write_array(path, paint())
        return np.load(path)

    def of_student(self, student: Student, guided: bool) -> np.ndarray:
        """uint8 [prompts, H, W, 3]."""
        name = f"{student.folder.name}{'-guided' if guided else ''}"
        return self._pictures(
            name, [student.weights, student.seed, guided], lambda: self._paint(student, guided)
        )

    def _paint(self, student: Student, guided: bool) -> np.ndarray:
        pipe = StudentPipeline.from_pretrained(student.folder, self.experts)
        pipe.set_progress_bar_config(disable=True)
        own = self.sampling
        made = pipe(
            list(self.prompts),
            num_inference_steps=own.steps,
            guidance_scale=own.guidance,
            sol_weight=own.sol_weight if guided else 0.0,
            lune_weight=own.lune_weight if guided else 0.0,
            seed=1_000_000 * student.seed,
            batch_size=self.batch_size,
            output_type="np",
        )
        return to_bytes(made.images)

    def of_experts(self, seed: int) -> np.ndarray:
        """uint8 [prompts, H, W, 3]."""
        own = self.sampling
        return self._pictures(
            f"experts-{seed}",
            [seed],
            lambda: generate(
                self.experts,
                "hybrid",
                list(self.prompts),
                seed,
                own.steps,
                self.batch_size,
                guidance_scale=own.guidance,
            ),
        )


Results = dict[str, dict[str, list[dict[str, float]]]]


def study(runs: Path, referee: Referee, painter: Painter) -> tuple[Results, dict[str, dict[str, np.ndarray]]]:
    """(Numbers by set, row and seed; pictures of the first seed by set and row)."""
    numbers: Results = {}
    pictures: dict[str, dict[str, np.ndarray]] = {}
    students = all_students(runs)
    todo = [(name, row) for name in students for row in ROWS]
    for name, row in track(todo, description="painting", transient=True):
        own = [student for student in students[name] if student.variant == row.variant]
        sets = [painter.of_student(student, row.guided) for student in own]
        measures = [referee.measure(images) for images in sets]
        numbers.setdefault(name, {})[row.title] = [
            {"seed": student.seed, **student.training, **values}
            for student, values in zip(own, measures, strict=True)
        ]
        pictures.setdefault(name, {})[row.title] = sets[0]
    seeds = sorted({student.seed for found in students.values() for student in found})
    beside = {REAL[key]: [images] for key, images in referee.real.items()}
    beside[EXPERTS] = [painter.of_experts(seed) for seed in seeds]
    numbers["references"] = {
        title: [referee.measure(images) for images in sets] for title, sets in beside.items()
    }
    pictures["references"] = {title: sets[0] for title, sets in beside.items()}
    return numbers, pictures


def paint(runs: Path, painter: Painter, names: Sequence[str]) -> None:
    """The pictures of the students by these names, for a later study."""
    students = [student for found in all_students(runs).values() for student in found]
    unknown = set(names) - {student.folder.name for student in students}
    if unknown:
        raise ValueError(f"there is no student {', '.join(sorted(unknown))} in {runs}")
    for student in (student for student in students if student.folder.name in names):
        for row in (row for row in ROWS if row.variant == student.variant):
            painter.of_student(student, row.guided)
