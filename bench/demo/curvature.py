"""Whether levels placed by the measured curvature of the experts' predictions beat the named spacings.

`python -m bench.demo.curvature` (minutes on one core) follows pilot prompts through Lune's part of a hybrid
run in many steps, reads from its predictions how much a step of a solver errs where, and places the few
levels of a run so that every step errs alike. On other prompts the pictures are compared with those of a long
run from the same handoff, beside the named spacings; docs/SOLVERS.md gets the table.

A small distance to the long run says that its equation was solved well, not that the picture is a good one.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bench.demo.solvers import SOLVERS
from bench.pages import renew_page
from moe_sampler import HybridPipeline, SamplingPlan, Trace
from moe_sampler.demo import experts_path
from moe_sampler.demo.captions import caption
from moe_sampler.demo.data import HELD_OUT_FIRST
from moe_sampler.demo.scenes import draw_scene
from moe_sampler.sampling.spacing_names import SPACING_NAMES, Levels

CALLS = (6, 10, 20)
SEEDS = (0, 1, 2)
SOL_STEPS = 3
PILOT_STEPS, LONG_STEPS = 60, 100
CLEANEST = 0.002
"""Where the last step of long runs begins, which is where that of beta levels does."""
STEP_ERRORS = {"dpmpp_2m": (2, 5 / 12), "euler": (1, 1 / 2)}
"""By solver p and c: a step of length h in log-SNR adds c * h^(p + 1) * |d^p x0 / d lambda^p| * alpha to the
state. The steps integrate exactly, but take the prediction for constant (Euler), or for linear with the slope
of the step before (DPM-Solver++(2M)).
"""


@dataclass(frozen=True)
class Curve:
    """How a solver errs along a run, in root mean squares over pictures; [n] float64 each.

    Args:
        order, factor: p and c of STEP_ERRORS.
        log_snr: ln(alpha / sigma), ascending.
        density: the p-th derivative of x0 there, times what of an error in x0 arrives at the picture.
        rest: the distance of x0 there to the last one, which is what a last step from there leaves undone.
    """

    order: int
    factor: float
    log_snr: np.ndarray
    density: np.ndarray
    rest: np.ndarray

    @classmethod
    def of(cls, solver: str, noise: Sequence[float], x0: np.ndarray) -> Curve:
        """From predictions x0 [n, ...] at noise levels [n], descending.

        An error of the state shrinks on its way to the data as that of normal data would, by
        d / sqrt(alpha^2 d^2 + sigma^2), d being the pictures' deviation.
        """
        order, factor = STEP_ERRORS[solver]
        log_snr = np.log(1.0 / np.asarray(noise, dtype=np.float64) - 1.0)
        flat = derivative = x0.reshape(len(x0), -1).astype(np.float64)
        for _ in range(order):
            derivative = np.gradient(derivative, log_snr, axis=0)
        arrives = 1.0 / np.sqrt(1.0 + np.exp(-2.0 * log_snr) / np.mean(flat[-1] ** 2))
        return cls(order, factor, log_snr, _rms(derivative) * arrives, _rms(flat - flat[-1]))

    def levels(self, count: int) -> tuple[float, ...]:
        """`count` noise levels, the first one the curve's: between the first and the last every step errs
        alike, which makes their sum least, and the last one is where that sum and what is left undone there
        are least together. As `Expert(levels=...)` takes them."""
        rate = self.density ** (1.0 / (self.order + 1))
        strides = 0.5 * (rate[1:] + rate[:-1]) * np.diff(self.log_snr)
        place = np.concatenate([[0.0], np.cumsum(strides)])
        steps = self.factor * place ** (self.order + 1) / max(count - 1, 1) ** self.order
        last = place[1 + np.argmin((steps + self.rest)[1:])]
        found = np.interp(np.linspace(0.0, last, count), place, self.log_snr)
        return tuple(float(level) for level in 1.0 / (1.0 + np.exp(found)))


def _rms(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(values**2, axis=1))


def even_in_log_snr(count: int, high: float) -> tuple[float, ...]:
    """From `high` to CLEANEST."""
    first, last = np.log(1.0 / np.array([high, CLEANEST]) - 1.0)
    between = 1.0 / (1.0 + np.exp(np.linspace(first, last, count)))
    return (high, *map(float, between[1:]))


def prompts(first: int, count: int) -> list[str]:
    """Captions of scenes that no expert was trained on."""
    numbers = range(HELD_OUT_FIRST + first, HELD_OUT_FIRST + first + count)
    return [caption(draw_scene(number), np.random.default_rng(number)) for number in numbers]


def plan_of(pipe: HybridPipeline, solver: str, levels: Levels, calls: int) -> SamplingPlan:
    """The same few steps of Sol, without fresh noise, then `calls` of Lune's."""
    experts = pipe.experts(solver={"sol": "ddim", "lune": solver}, levels={"lune": levels}, reuse=1)
    listed = not isinstance(levels, str)
    steps = {"sol": SOL_STEPS, **({} if listed else {"lune": calls})}
    made = pipe.plan("hybrid", steps, experts=experts)
    if len(made) != SOL_STEPS + calls:
        raise ValueError(f"{levels} levels make {len(made) - SOL_STEPS} steps instead of {calls}")
    return made


def follow(pipe: HybridPipeline, texts: Sequence[str]) -> dict[str, Curve]:
    """Lune's curve for each solver, from one long run with a picture a prompt."""
    levels = even_in_log_snr(PILOT_STEPS, pipe.config["handoff"])
    trace = Trace()
    pipe(
        list(texts),
        plan=plan_of(pipe, "dpmpp_2m", levels, PILOT_STEPS),
        seed=list(range(len(texts))),
        output_type="latent",
        callback_on_step_end=trace,
        callback_on_step_end_tensor_inputs=trace.tensor_inputs,
    )
    x0 = torch.stack(trace.predictions[SOL_STEPS:]).numpy()
    return {solver: Curve.of(solver, levels, x0) for solver in STEP_ERRORS}


def pictures(pipe: HybridPipeline, texts: Sequence[str], plan: SamplingPlan) -> np.ndarray:
    """float64 [seeds, prompts, height, width, 3], 0 to 1."""
    seeds = [1_000_000 * seed + i for seed in SEEDS for i in range(len(texts))]
    made = np.asarray(pipe(list(texts) * len(SEEDS), plan=plan, seed=seeds, output_type="np").images, float)
    return made.reshape(len(SEEDS), len(texts), *made.shape[1:])


Distances = dict[tuple[str, str, int], np.ndarray]
"""By solver, levels and calls: of each picture [seeds, prompts], in units of 1/255."""
NAMES = (*SPACING_NAMES, "curvature")


def measure(pipe: HybridPipeline, texts: Sequence[str], curves: dict[str, Curve]) -> Distances:
    """Root mean squares of differences from the long run's pictures."""
    high = pipe.config["handoff"]
    long = pictures(pipe, texts, plan_of(pipe, "dpmpp_2m", even_in_log_snr(LONG_STEPS, high), LONG_STEPS))
    found: Distances = {}
    for solver, calls, name in itertools.product(curves, CALLS, NAMES):
        levels = (high, *curves[solver].levels(calls)[1:]) if name == "curvature" else name
        made = pictures(pipe, texts, plan_of(pipe, solver, levels, calls))
        distances = 255 * np.sqrt(np.mean((made - long) ** 2, axis=(2, 3, 4)))
        found[solver, name, calls] = distances
        print(f"{solver} {name} {calls}: {distances.mean():.2f}", flush=True)
    return found


def table(found: Distances) -> str:
    """Markdown, a row a solver and spacing: for each number of calls the distance, the least in bold, and the
    share of pictures that curvature brings nearer than that row does."""
    titles = ("solver", "levels", *(f"{calls} calls | curvature nearer" for calls in CALLS))
    lines = [f"| {' | '.join(titles)} |", "|---" * (2 + 2 * len(CALLS)) + "|"]
    for solver, name in itertools.product(STEP_ERRORS, NAMES):
        cells = []
        for calls in CALLS:
            own, placed = found[solver, name, calls], found[solver, "curvature", calls]
            seeds = own.mean(axis=1)
            cell = f"{seeds.mean():.2f} ± {seeds.std(ddof=1):.2f}"
            least = min(found[solver, other, calls].mean() for other in NAMES)
            cells.append(f"**{cell}**" if own.mean() == least else cell)
            cells.append("" if name == "curvature" else f"{np.mean(placed < own):.0%}")
        lines.append(f"| {solver} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def block(found: Distances, curves: dict[str, Curve], pilots: int, count: int) -> str:
    """What docs/SOLVERS.md shows."""
    placed = "; ".join(
        f"for {solver} {', '.join(f'{level:.2f}' for level in curve.levels(8))}"
        for solver, curve in curves.items()
    )
    return "\n\n".join(
        [
            f"Lune's part from the demo's handoff, behind {SOL_STEPS} steps of Sol without fresh noise: "
            f"root mean square distance of a picture to that of {LONG_STEPS} steps, in 1/255, over {count} "
            f"prompts, mean ± standard deviation between {len(SEEDS)} seeds; and how many pictures curvature "
            f"brings nearer. The curvature is that of {pilots} other prompts in {PILOT_STEPS} steps; it puts "
            f"eight steps {placed}. Made by `python -m bench.demo.curvature`.",
            table(found),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pilots", type=int, default=16, help="prompts to follow")
    parser.add_argument("--count", type=int, default=24, help="prompts to compare")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = HybridPipeline.from_pretrained(experts_path(), speed="fast")
    pipe.set_progress_bar_config(disable=True)
    curves = follow(pipe, prompts(0, options.pilots))
    found = measure(pipe, prompts(options.pilots, options.count), curves)
    own = block(found, curves, options.pilots, options.count)
    renew_page(SOLVERS, "curvature", own)
    print(own)


if __name__ == "__main__":
    main()
