"""What a run of several images leaves: numbered files, with traces and animations if wanted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import typer

__all__ = ["Files", "Watch"]


class Watch:
    """A trace for every batch. A batch goes through a stage of the plan before the next one does, so a step
    is told once by each, in their order."""

    tensor_inputs = ("pred_original_sample",)

    def __init__(self, images: int, batch_size: int | None) -> None:
        from ..viewing.trace import Trace

        self._size = batch_size or images
        self._traces = [Trace() for _ in range(0, images, self._size)]
        self._told: Counter[int] = Counter()

    def __call__(self, pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        trace = self._traces[self._told[step]]
        self._told[step] += 1
        return trace(pipe, step, timestep, tensors)

    def of(self, index: int) -> tuple[Any, int]:
        """An image's trace, and its place in it."""
        return self._traces[index // self._size], index % self._size


class Files:
    """What will be written, checked now: one name as it is given, several numbered from 1."""

    def __init__(self, output: Path, count: int, trace: bool, animate: bool) -> None:
        from ..viewing.images import check_writable

        stems = [output] if count == 1 else [output.with_stem(f"{output.stem}-{i + 1}") for i in range(count)]
        self.paths = stems
        self.sheets = [path.with_suffix(".trace.png") for path in stems] if trace else []
        self.animations = [path.with_suffix(".webp") for path in stems] if animate else []
        for path in self.paths + self.sheets:
            check_writable(path, ".safetensors" if output.suffix == ".safetensors" else ".png")
        for path in self.animations:
            check_writable(path, ".webp")

    def write(self, pipe: Any, result: Any, index: int, record: dict[str, Any], watch: Watch | None) -> None:
        from .. import __version__
        from ..viewing.images import save_latents, save_png
        from ..viewing.images import zoom as enlarge

        made, path = result.images[index], self.paths[index]
        record["version"] = __version__
        if path.suffix == ".safetensors":
            save_latents(made[None], path, record)
            typer.echo(str(path))
            return
        record["zoom"] = record.get("zoom") or max(1, round(512 / max(made.size)))
        save_png(enlarge(made, record["zoom"]), path, record)
        typer.echo(str(path))
        if watch is None:
            return
        trace, place = watch.of(index)
        title = f'"{record["prompt"]}", seed {record["seed"]}'
        if self.sheets:
            save_png(trace.sheet(pipe, result.plan, place, title=title), self.sheets[index], record)
            typer.echo(str(self.sheets[index]))
        if self.animations:
            trace.animation(pipe, result.plan, place, title=title).save(self.animations[index])
            typer.echo(str(self.animations[index]))
