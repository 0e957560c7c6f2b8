"""Planning: from experts and a router to a table of coefficients, in float64, before the first model call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_sampler.kernels.rows import COLUMNS

from .._numbers import number, whole
from .calls import expert_call
from .experts import Expert
from .paths import Level
from .plan import ExpertCall, PlanStep, SamplingPlan
from .recipe import Recipe
from .reuse import marked, settled
from .routers import PerStep, Router, Spans, active_experts, lead_expert, lead_spans
from .scheduler_names import is_borrowed, is_known_name, solver_label
from .solvers import HEUN_CORRECTOR, MOST_PAST, SOLVERS, SolverRow, heun_corrector_row, solver_row
from .step_counts import MAX_STEPS, span_counts, steps_of
from .trails import Evaluation, Trail, begin_behind, retargeted

__all__ = ["ExpertCall", "PlanStep", "SamplingPlan", "plan"]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class _Node:
    """A place where models are evaluated: the state's level and who looks at it."""

    noise: float
    weights: Mapping[str, float]
    lead: Expert
    level: Level
    borrowed: Evaluation | None = None
    """What the lead's scheduler does here, if it has one for a solver."""


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """One evaluation of a node's experts, and what the solver makes of it."""

    node: _Node
    target: Level
    solver: str
    update: SolverRow


def _check_reach(expert: Expert, high: float, low: float, start: float) -> None:
    """An expert with integer timesteps can't work beyond the noisiest of them, nor below the cleanest."""
    if not expert.path.discrete:
        return
    noisiest, cleanest = (
        expert.path.level(round(expert.path.timestep(expert.path.at(noise)))).noise for noise in (1.0, 0.0)
    )
    if low >= noisiest:
        raise ValueError(
            f"{expert.name}'s noisiest timestep is noise level {noisiest:.6f}, not above {low:g}, where it "
            f"is to hand over: hand over at {math.floor(noisiest * 1000) / 1000:g} or further down, or plan "
            f"without {expert.name}"
        )
    if high <= cleanest and high < start:
        raise ValueError(
            f"{expert.name}'s cleanest timestep is noise level {cleanest:.6f}, not below {high:g}, where it "
            f"is to take over: do so at {math.ceil(cleanest * 1000) / 1000:g} or further up, or plan without "
            f"{expert.name}"
        )


def _spanned_nodes(
    experts: Mapping[str, Expert],
    router: Router,
    steps: int | Mapping[str, int] | None,
    start: float,
    end: float,
) -> tuple[list[_Node], float | None]:
    """Nodes for every span, each on its leading expert's own grid or its scheduler's levels; and what the run
    is to be started with, if a scheduler says so."""
    spans = lead_spans(router, list(experts), start, end)
    for name, high, low in spans if len(spans) > 1 else ():
        _check_reach(experts[name], high, low, start)
    counts = span_counts(experts, spans, steps)
    nodes: list[_Node] = []
    initial_scale = None
    parts = [(experts[name], count, *ends) for (name, *ends), count in zip(spans, counts, strict=True)]
    for borrowed, stretch in itertools.groupby(parts, lambda part: is_borrowed(part[0].solver)):
        landing = nodes[-1].borrowed.landing if nodes and nodes[-1].borrowed else None
        if borrowed:
            from .shared_trails import Part, trails  # brings torch, which other plans don't need

            given = [Part(*part) for part in stretch]
            found = trails(given, own_counts=not isinstance(steps, Mapping))
            for part, trail in zip(given, found, strict=True):
                initial_scale = initial_scale if nodes else trail.initial_scale
                nodes += [_borrowed_node(experts, router, part.expert, each) for each in trail.evaluations]
            continue
        for lead, count, high, low in stretch:
            high = high if landing is None else begin_behind(high, low, landing.noise)
            landing = None
            nodes += [_routed(experts, router, noise) for noise in lead.nodes(count, high, low)]
    return nodes, initial_scale


def _borrowed_node(
    experts: Mapping[str, Expert], router: Router, lead: Expert, evaluation: Evaluation
) -> _Node:
    """Where a scheduler calls the model. It is its expert's alone where another one leads: at the second call
    of a step across the handoff."""
    noise = evaluation.level.noise
    weights = active_experts(router, noise, list(experts))
    if lead_expert(weights) != lead.name:
        weights = {lead.name: 1.0}
    return _Node(noise, weights, lead, evaluation.level, evaluation)


def _check_own_levels(experts: Mapping[str, Expert]) -> None:
    for expert in experts.values():
        if is_borrowed(expert.solver):
            raise ValueError(
                f"{expert.name}: {solver_label(expert.solver)} brings its own noise levels, so that none "
                f"can be given, and no router per step: use steps and a Boundary, Spans or Crossfade, or "
                f"{', '.join(SOLVERS)}"
            )


def _levels_per_step(
    experts: Mapping[str, Expert], leads: Sequence[str], start: float, end: float
) -> list[float]:
    """Nodes of a `PerStep`: the lead changes where the shared grid has the change's step, and every stretch
    between two changes is a span on its leading expert's own grid."""
    for name in dict.fromkeys(leads):
        if isinstance(experts[name].levels, tuple):
            raise ValueError(
                f"{name} lists its levels, and the router its steps: give the levels of all steps as "
                "noise_levels, or another router"
            )
    flows = [experts[name] for name in dict.fromkeys(leads) if not experts[name].path.discrete]
    shared = max(flows, key=lambda e: e.shift, default=experts[leads[0]])
    nodes = shared.nodes(len(leads), start, end)
    changes = [i for i in range(1, len(leads)) if leads[i] != leads[i - 1]]
    edges = [(0, start), *((i, nodes[i]) for i in changes), (len(leads), end)]
    levels = []
    for (first, high), (stop, low) in itertools.pairwise(edges):
        lead = experts[leads[first]]
        levels += lead.nodes(stop - first, high, low)
    return levels


def _node(experts: Mapping[str, Expert], weights: Mapping[str, float], noise: float) -> _Node:
    lead = experts[lead_expert(weights)]
    # A discrete-time model sees only its integer grid; a continuous one follows it anywhere.
    grid = next((e.path for e in (lead, *(experts[name] for name in weights)) if e.path.discrete), None)
    level = lead.path.at(noise)
    if grid is not None:
        on_grid = grid.level(round(grid.timestep(level)))
        noise = on_grid.noise
        level = on_grid if lead.path is grid else lead.path.at(noise)
    return _Node(noise, weights, lead, level)


def _routed(experts: Mapping[str, Expert], router: Router, noise: float) -> _Node:
    """The node with the router's weights where the models really look: on a discrete expert's grid, if one
    is at work."""
    node = _node(experts, active_experts(router, noise, list(experts)), noise)
    if node.noise == noise:
        return node
    seen = active_experts(router, node.noise, list(experts))
    return _node(experts, seen, noise) if seen.keys() == node.weights.keys() else node


def _check_descending(nodes: Sequence[_Node]) -> None:
    for earlier, later in itertools.pairwise(nodes):
        if later.noise < earlier.noise or (later.borrowed and earlier.lead is later.lead):
            continue
        if earlier.borrowed and earlier.borrowed.corrects and math.isclose(later.noise, earlier.noise):
            continue  # the second call of a step, where the next expert's first one is
        if earlier.lead is later.lead:
            raise ValueError(
                f"two steps fall on noise level {later.noise:.4f} of the integer timesteps: use fewer steps"
            )
        raise ValueError(
            f"{earlier.lead.name}'s last step is at noise level {earlier.noise:.4f}, and the first one of "
            f"{later.lead.name} at {later.noise:.4f}, not below: the nearest integer timestep lies on "
            f"the wrong side of the handoff. Hand over elsewhere, or give {earlier.lead.name} fewer steps"
        )


def _corrector_at(experts: Mapping[str, Expert], last: _Node, end: float) -> _Node | None:
    """The last node's experts at the end of a run that keeps some noise, if their grids hold that level."""
    node = _node(experts, last.weights, end)
    return node if math.isclose(node.noise, end, rel_tol=1e-9) else None


def _evaluations(experts: Mapping[str, Expert], nodes: Sequence[_Node], end: float) -> Iterator[_Evaluation]:
    """One step from every node to the next; the last one goes to `end`. Nothing is said yet of what is kept.

    A Heun step evaluates a second time where it arrives. Who works at that level is the router's to say, so
    across a handoff the next expert does, and is told a timestep of its own grid. Into the data, and to an
    end between two integer timesteps, there is no second evaluation.
    """
    past: list[Level] = []  # the levels that memories were predicted at, newest first
    for node, following in zip(nodes, [*nodes[1:], None], strict=True):
        if node.borrowed is not None:
            yield _borrowed_evaluation(node, node.borrowed, following, end)
            past = []  # what a scheduler keeps is its own
            continue
        heun = node.lead.solver == "heun"
        if following is None and heun and end > 0.0:
            following = _corrector_at(experts, node, end)
        if following is not None:
            target = following.level
        else:
            target = node.lead.last_level if end == 0.0 else node.lead.path.at(end)
        if following is None and target == node.level:
            update = SolverRow(1.0, 0.0)  # the last node is where the run ends
        else:
            update = solver_row(node.lead.solver, node.level, target, past, node.lead.eta)
        yield _Evaluation(node, target, node.lead.solver, update)
        past = [node.level, *past][:MOST_PAST]
        if heun and following is not None:
            yield _Evaluation(following, target, HEUN_CORRECTOR, heun_corrector_row(node.level, target))
            past = [target, *past][:MOST_PAST]


def _borrowed_evaluation(
    node: _Node, borrowed: Evaluation, following: _Node | None, end: float
) -> _Evaluation:
    """A scheduler's step, the last one of which lands where the next expert, or the run's end, is."""
    target = borrowed.landing
    if following is not None:
        target = following.level
    elif end > 0.0:
        target = node.lead.path.at(end)
    elif is_known_name(node.lead.solver):  # some of diffusers' schedulers stop short of the data
        target = node.lead.last_level
    update = retargeted(borrowed.update, node.level, borrowed.landing, target)
    solver = solver_label(node.lead.solver) + ("_corrector" if borrowed.corrects else "")
    return _Evaluation(node, target, solver, update)


def _remembering(evaluations: Sequence[_Evaluation]) -> list[_Evaluation]:
    """The same, where every prediction that later evaluations read is kept."""
    read = {
        i - age
        for i, own in enumerate(evaluations)
        if own.node.borrowed is None
        for age in range(1, own.update.memories + 1)
    }
    return [
        replace(own, update=own.update._replace(keep_x0=1.0)) if i in read else own
        for i, own in enumerate(evaluations)
    ]


def _zero_init_steps(experts: Mapping[str, Expert], nodes: Sequence[_Node]) -> int:
    """How many of the first steps are left out: a guider's zero prediction of a flow leaves the noise as it
    is, so the run may as well begin with the step after them."""
    found = 0
    for name in dict.fromkeys(name for node in nodes for name in node.weights):
        guider = experts[name].own_guider
        count = 0 if guider is None else guider.zero_init_steps
        first = nodes[: count + 1]
        own = all(list(node.weights) == [name] and node.borrowed is None for node in first)
        if count and not (own and len(first) > count and nodes[0].noise == 1.0):
            raise ValueError(
                f"{name}: {count} zero_init_steps are for a run that begins from noise alone, with more "
                f"steps than that of {name} alone and a built-in solver: leave them out"
            )
        found = max(found, count)
    return found


def _check_row(row: Mapping[str, float], calls: Sequence[ExpertCall], index: int, step: _Evaluation) -> None:
    numbers = {**row, "clip": 0.0, **{f"{call.name}'s timestep": call.timestep for call in calls}}
    bad = [f"{name} = {value:g}" for name, value in numbers.items() if not abs(value) <= _LARGEST]
    if bad:
        raise ValueError(
            f"step {index} ({' + '.join(step.node.weights)}, {step.solver}, noise {step.node.noise:.6g} to "
            f"{step.target.noise:.6g}) has coefficients that are no finite float32 numbers: "
            f"{', '.join(bad)}. Choose other noise levels, another prediction type or another solver"
        )


def _compile(experts: Mapping[str, Expert], evaluations: Sequence[_Evaluation]) -> tuple[PlanStep, ...]:
    calls: list[tuple[ExpertCall, ...]] = []
    rows: list[dict[str, float]] = []
    for step in evaluations:
        clip = step.node.lead.clip_sample_range
        row = dict.fromkeys(COLUMNS, 0.0) | step.update._asdict()
        row["clip"] = math.inf if clip is None else clip
        own = []
        for slot, (name, weight) in enumerate(step.node.weights.items()):
            borrowed = step.node.borrowed
            told = borrowed.timestep if borrowed is not None and name == step.node.lead.name else None
            call, p, (q_cond, q_uncond) = expert_call(experts[name], weight, step.node.level, told)
            own.append(call)
            row["p"] += p
            row[f"q_cond_{slot}"], row[f"q_uncond_{slot}"] = q_cond, q_uncond
            if rows:
                # The launch that ends a step also writes the next step's model inputs.
                rows[-1][f"scale_{slot}"] = call.input_scale
        calls.append(tuple(own))
        rows.append(row)
    for index, (step, own, row) in enumerate(zip(evaluations, calls, rows, strict=True)):
        _check_row(row, own, index, step)
    return tuple(
        PlanStep(own, step.node.level, step.target, step.solver, tuple(row[name] for name in COLUMNS))
        for own, step, row in zip(calls, evaluations, rows, strict=True)
    )


def plan_trail(expert: Expert, trail: Trail) -> SamplingPlan:
    """A run of one expert that is one trail."""
    known, router = {expert.name: expert}, Spans(((expert.name, 0.0),))
    nodes = [_borrowed_node(known, router, expert, each) for each in trail.evaluations]
    _zero_init_steps(known, nodes)
    evaluations = [
        _Evaluation(node, each.landing, trail.name + ("_corrector" if each.corrects else ""), each.update)
        for node, each in zip(nodes, trail.evaluations, strict=True)
    ]
    compiled = _compile(known, evaluations)
    return SamplingPlan(marked(compiled, settled(known, len(compiled))), trail.initial_scale)


def _check_noise_levels(noise_levels: Sequence[float], end: float) -> list[float]:
    levels = [number("a noise level", noise) for noise in noise_levels]
    whole("the count of noise levels", len(levels), MAX_STEPS, least=0)
    if (
        not levels
        or not all(end < later < earlier for earlier, later in itertools.pairwise([math.inf, *levels]))
        or levels[0] > 1.0
    ):
        raise ValueError(
            f"noise levels must be given from noise to data, descending, at most 1 and above the end of the "
            f"run ({end})"
        )
    return levels


def plan(
    experts: Expert | Sequence[Expert],
    router: Router | PerStep | None = None,
    *,
    steps: int | Mapping[str, int] | None = None,
    start: float = 1.0,
    end: float = 0.0,
    noise_levels: Sequence[float] | None = None,
) -> SamplingPlan:
    """Compile a run: every step's guidance, conversion, solver, handoff and mixing folded into one row.

    Args:
        experts: one or several. Their solver, shift, spacing, guidance and clipping are their own.
        router: who works at which noise level; not needed for a single expert.
        steps: in all (20 by default), shared out over the experts' spans by their length on the shifted grid;
            or by name, `{"sol": 8, "lune": 12}`. A Heun step counts once and is two rows. Experts that list
            their levels have as many steps as that, and the others what is left of the number; a `PerStep`
            router brings its own count.
        start, end: the noise levels (`Level.noise`) the run begins and ends at. A discrete-time expert begins
            at its timestep nearest to `start`: `SamplingPlan.start_level` says where the run really begins.
        noise_levels: the nodes themselves, descending, instead of `steps`, `start` and the experts' grids;
            where a discrete-time expert is at work, its nearest timesteps.

    Returns:
        An immutable `SamplingPlan`.

    Raises:
        ValueError: anything out of range or inconsistent, or a coefficient that is not finite, before any
            work.
    """
    known = {e.name: e for e in ([experts] if isinstance(experts, Expert) else experts)}
    if not known or len(known) < (1 if isinstance(experts, Expert) else len(experts)):
        raise ValueError("give at least one expert, each with a name of its own")
    if router is None:
        if len(known) > 1:
            raise ValueError(f"{len(known)} experts need a router that says which works when")
        router = Spans(((next(iter(known)), 0.0),))
    if not (callable(router) or isinstance(router, PerStep)):
        raise TypeError(f"a router is a callable from noise level to weights, or a PerStep, got {router!r}")
    start, end = number("start", start), number("end", end)
    if not 0.0 <= end < start <= 1.0:
        raise ValueError(f"a run goes from start to end with 0 <= end < start <= 1, got {start} to {end}")
    steps, spaced = steps_of(steps, router, known.values()), noise_levels is None

    given = None if noise_levels is None else _check_noise_levels(noise_levels, end)
    noise_levels, initial_scale = given, None
    if given is not None or isinstance(router, PerStep):
        _check_own_levels(known)
    if isinstance(router, PerStep):
        weights = router.weights(list(known))
        if noise_levels is None:
            noise_levels = _levels_per_step(known, [lead_expert(own) for own in weights], start, end)
        elif len(noise_levels) != len(weights):
            raise ValueError(
                f"the router decides {len(weights)} steps one by one, but there are "
                f"{len(noise_levels)} noise levels"
            )
        nodes = [_node(known, own, noise) for noise, own in zip(noise_levels, weights, strict=True)]
    elif noise_levels is None:
        nodes, initial_scale = _spanned_nodes(known, router, steps, start, end)
    else:
        nodes = [_routed(known, router, noise) for noise in noise_levels]
    _check_descending(nodes)
    if not nodes[-1].noise > end:
        raise ValueError(
            f"the last step's integer timestep is noise level {nodes[-1].noise:.4f}, not above the end of "
            f"the run ({end:.4f}): end further down"
        )
    unmoved = _zero_init_steps(known, nodes)
    evaluations = _remembering(list(_evaluations(known, nodes[unmoved:], end)))
    # Where a grid begins is its own affair; levels that were asked for may leave out the run's first part.
    asked = start < 1.0 or not spaced
    from_image = asked and nodes[0].noise < _node(known, nodes[0].weights, 1.0).noise
    if initial_scale is None:
        initial_scale = nodes[0].lead.path.initial_scale(nodes[0].level)
    known = settled(known, len(evaluations))
    work = [(node.noise, node.weights) for node in nodes]
    recipe = Recipe.of(known.values(), router, steps, (start, end), given, work)
    compiled = marked(_compile(known, evaluations), known)
    return SamplingPlan(compiled, initial_scale, from_image, recipe)
