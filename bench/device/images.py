"""Images a second and the time of a step, of models of Stable Diffusion 1.5's size, by every provider."""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Iterator

import torch

from bench.counting import count_dispatches, peak_memory
from bench.device.models import FULL, TOY, Models
from bench.device.providers import COMPILERS, DIFFUSERS, OURS_HYBRID, PROVIDERS, SAME_AS, Provider
from bench.device.results import Results, Row
from bench.graphs import recorded, seconds_of
from bench.measure import DEVICE, OURS, Call
from bench.pipelines import outside

__all__ = ["host_waits", "measure"]

_PIPELINES = {DIFFUSERS: "theirs", OURS: "ours", OURS_HYBRID: "ours"}
"""Providers that call their models as modules, so that the time beside them can be told."""

_ALIKE = 0.05
"""By how much pixels in [0, 1] may differ that two paths make in float16."""


def measure(results: Results) -> None:
    size = TOY if results.rehearsal else FULL
    models = Models(size)
    for batch in size.batches:
        results.attempt(f"UNet alone, batch {batch}", lambda batch=batch: _unet(models, batch))
    for providers, batch in itertools.product(PROVIDERS, size.batches):
        for name, provider in providers.items():
            results.attempt(
                f"{name}, batch {batch}",
                lambda name=name, provider=provider, batch=batch: _row(models, name, provider, batch),
                limit=150 if name in COMPILERS else 60,
            )


@torch.no_grad()
def _unet(models: Models, batch: int) -> Iterator[tuple[str, Row]]:
    """One call of the UNet as the device alone takes it: what a step cannot be faster than without changing
    the model or how it is computed."""
    inputs = models.model_input(batch)
    unet = models.ours.unet_sol
    seconds = seconds_of(recorded(lambda: unet(**inputs, return_dict=False), DEVICE), DEVICE, samples=7)
    yield "unet", {"batch": batch, "unet_ms": seconds * 1e3}


def _row(models: Models, name: str, provider: Provider, batch: int) -> Iterator[tuple[str, Row]]:
    """Images a second of whole calls; a step is what a call gets longer by."""
    size = models.size
    call, shorter = (provider(models, batch, steps) for steps in (size.steps, size.fewer))
    seconds, fewer = _wall_seconds(call, shorter)
    row: Row = {
        "provider": name,
        "batch": batch,
        "steps": size.steps,
        "images_per_s": batch / seconds,
        "step_ms": (seconds - fewer) / (size.steps - size.fewer) * 1e3,
        "beside_steps_ms": (seconds - size.steps * (seconds - fewer) / (size.steps - size.fewer)) * 1e3,
        "host_waits": host_waits(call, name in COMPILERS),
        "peak_MiB": peak_memory(call, DEVICE) / 2**20,
    }
    if name in _PIPELINES:
        pipe = getattr(models, _PIPELINES[name])
        row["outside_models"] = outside(pipe, call, calls=1)
    images = call()
    row["finite"] = bool(torch.isfinite(images).all())
    if name in SAME_AS:
        row["difference"] = (images - SAME_AS[name](models, batch, size.steps)()).abs().max().item()
    yield "images", row
    if not row["finite"] or row.get("difference", 0.0) > _ALIKE:
        raise AssertionError(f"images finite: {row['finite']}, difference {row.get('difference')}")


def _wall_seconds(*calls: Call) -> list[float]:
    """The median of several turns of each, every call waited for, by the clock; they take turns."""
    taken: list[list[float]] = []
    for call in calls:
        call()
    _wait()
    while not taken or (DEVICE == "cuda" and len(taken) < 5 and sum(map(sum, taken)) < 3):
        turn = []
        for call in calls:
            start = time.perf_counter()
            call()
            _wait()
            turn.append(time.perf_counter() - start)
        taken.append(turn)
    return [statistics.median(times) for times in zip(*taken, strict=True)]


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def host_waits(call: Call, compiled: bool = False) -> int | None:
    """How often the host stands still for the device in one call; None for compiled functions on a CPU.

    CUDA says so itself. On a CPU the operators that would wait are counted.
    """
    if DEVICE == "cpu":
        return None if compiled else count_dispatches(call)[1]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)
