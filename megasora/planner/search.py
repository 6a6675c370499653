"""All layouts of so many devices, best first, and what else a search can answer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megasora.errors import ConfigError
from megasora.observe.hardware import GIB, Device
from megasora.parallel.layout import Layout
from megasora.parallel.plan import check_layout
from megasora.planner.job import Job, Recompute
from megasora.planner.memory import memory
from megasora.planner.plan import Plan, build_plan, has_room, label, single_sample_step, with_device
from megasora.planner.stages import blocks_of
from megasora.planner.step_time import Step

# The cheapest first. Of a forward pass, a third of the time, selective repeats what no matrix product is.
POLICIES: list[tuple[Recompute, int]] = [("none", 1), ("selective", 1), ("full", 4), ("full", 2), ("full", 1)]
MOST = 16384  # devices
# A job on a layout with what it recomputes, and its steps. Raises ConfigError where they do not go together.
Make = Callable[[Layout, Recompute, int], tuple[Job, Sequence[Step]]]


@dataclass(frozen=True)
class Candidate:
    """A layout and what became of it: a plan, or why there is none."""

    name: str
    plan: Plan | None
    why: str = ""


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def layouts(world: int, node: int, model: Any) -> Iterator[Layout]:
    """Of so many devices: tensor groups within a node, at most so many heads and blocks as there are."""
    for tp in (d for d in divisors(world) if d <= node):
        for pp in (d for d in divisors(world // tp) if d <= blocks_of(model) and d <= 32):
            for ulysses in (d for d in divisors(world // tp // pp) if tp * d <= model.heads):
                for ring in divisors(world // tp // pp // ulysses):
                    dp = world // (tp * pp * ulysses * ring)
                    base = Layout(pp=pp, ulysses=ulysses, ring=ring, tp=tp)
                    for schedule in ("1f1b", "interleaved") if pp > 1 else ("1f1b",):
                        yield from with_zero(replace(base, schedule=schedule), dp, node)


def with_zero(base: Layout, dp: int, node: int) -> Iterator[Layout]:
    """Ways to keep the state of `dp` data-parallel ranks, the context-parallel ones among them."""
    yield replace(base, dp_replicate=dp, zero=0)
    if dp * base.cp == 1:
        return
    yield replace(base, dp_shard=dp, zero=1)
    if base.pp == 1:  # gathering weights in every row of a pipeline pays nowhere
        yield replace(base, dp_shard=dp, zero=2)
        yield replace(base, dp_shard=dp, zero=3)
        inside = max(1, node // (base.tp * base.cp))
        if 1 < inside < dp and dp % inside == 0:
            yield replace(base, dp_replicate=dp // inside, dp_shard=inside, zero=3)


def beside(layout: Layout, node: int, model: Any) -> Iterator[Layout]:
    """The layout itself and those one step away: a factor of two moved from one degree to another, or the state kept, or the
    pipeline run, in another way."""
    for other in layouts(layout.world, node, model):
        degrees = [(getattr(layout, name), getattr(other, name)) for name in ("pp", "ulysses", "ring", "tp", "dp")]
        changed = [(ours, theirs) for ours, theirs in degrees if ours != theirs]
        if len(changed) in (0, 2) and all(max(pair) == 2 * min(pair) for pair in changed):
            yield other


def search(
    make: Make,
    tried: Iterable[Layout],
    device: Device,
    model: Any,
    node: int | None,
) -> list[Candidate]:
    """Every layout once, with the cheapest recomputation that fits: those that fit by their time, then those that do not. `node`:
    as in check_layout."""
    found = []
    for layout in tried:
        try:
            check_layout(model, layout, node)
        except ConfigError:
            continue
        found.append(best_policy(make, layout, device))
    return sorted(found, key=lambda one: one.plan.time.seconds if one.plan and one.plan.fits else float("inf"))


def best_policy(make: Make, layout: Layout, device: Device) -> Candidate:
    """A layout with as little recomputed as fits."""
    try:
        job, steps = make(layout, *POLICIES[-1])
    except ConfigError as error:
        return Candidate(str(layout), None, str(error))
    if has_room(job, device):  # where most is computed again: else nothing helps
        for recompute, every in POLICIES:
            job = replace(job, recompute=recompute, every=every)
            if has_room(job, device):
                return Candidate(label(job), build_plan(job, steps, device))
    needed = sum(with_device(memory(job), device).values())
    return Candidate(str(layout), None, f"needs {needed / GIB:.0f} GiB even where all is recomputed")


def reasons(found: Sequence[Candidate]) -> list[str]:
    """Why each is not the best: the part of its step that is longer by most."""
    best = found[0].plan
    said = []
    for one in found:
        if one.plan is None or best is None:
            said.append(one.why)
        elif one.plan is best:
            said.append("best")
        else:
            ours, theirs = best.time.parts, one.plan.time.parts
            more = {name: theirs.get(name, 0.0) - ours.get(name, 0.0) for name in theirs.keys() | ours.keys()}
            worst = max(more, key=lambda name: more[name])
            said.append(f"{worst} {more[worst]:+.2f} s")
    return said


def fewest(make: Make, device: Device, model: Any, node: int | None) -> Plan | None:
    """The least number of devices (a power of two) on which some layout fits, and the fastest of those that do."""
    world = 1
    while world <= MOST:
        if any(True for _ in with_room(make, world, device, model, node)):
            return search(make, layouts(world, device.node, model), device, model, node)[0].plan
        world *= 2
    return None


def with_room(make: Make, world: int, device: Device, model: Any, node: int | None) -> Iterator[Layout]:
    """The layouts on which the job fits where all is recomputed."""
    for layout in layouts(world, device.node, model):
        try:
            check_layout(model, layout, node)
            job, _ = make(layout, "full", 1)
        except ConfigError:
            continue
        if has_room(job, device):
            yield layout


def longest(
    job: Job, world: int, device: Device, grid: tuple[int, int], text: int, node: int | None
) -> tuple[int, Plan] | None:
    """The most frames of H x W patches of which one sample a data-parallel rank fits on so many devices, to a hundredth, and
    the fastest layout for it."""

    def make(frames: int) -> Make:
        def made(layout: Layout, recompute: Recompute, every: int) -> tuple[Job, Sequence[Step]]:
            steps = [single_sample_step((frames, *grid), text, layout)]
            row = steps[0].rows[0][0]
            return replace(job, layout=layout, row=row, rows=1, recompute=recompute, every=every), steps

        return made

    def fits(frames: int) -> bool:
        return any(True for _ in with_room(make(frames), world, device, job.model, node))

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == 0:
        return None
    plan = search(make(low), layouts(world, device.node, job.model), device, job.model, node)[0].plan
    return (low, plan) if plan is not None else None


def nearest(found: Sequence[Candidate], layout: Layout) -> Plan | None:
    """Of what fits the layout with the fewest degrees changed; of equals the fastest."""
    fitting = [one.plan for one in found if one.plan is not None]

    def distance(plan: Plan) -> tuple[int, float]:
        ours, theirs = vars(layout), vars(plan.job.layout)
        return sum(ours[name] != theirs[name] for name in ours), plan.time.seconds

    return min(fitting, key=distance, default=None)
