"""A run on many GPUs, failures included: step, goodput, days, and how often to save."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nexa.hardware import peak_of
from nexa.scaling.layout import Layout
from nexa.scaling.plan import Plan, Planner
from nexa.scaling.reliability import GPU_HOURS_PER_FAILURE, daly, goodput, time_between_failures
from nexa.scaling.step_time import StepTime, flops

HOST_BYTES = 25e9
"""Assumed bytes per second of a copy from a GPU to pinned memory: PCIe 4.0 with 16 lanes gives 31.5e9."""
STORAGE_BYTES = 10e9
"""Assumed bytes per second that all ranks together write to storage."""
RESTART_SECONDS = 600.0
"""Assumed from a failure to the next step: noticed, queued, started, loaded."""


@dataclass(frozen=True)
class Faults:
    """How often something fails and what that costs."""

    node_hours: float | None = None
    """Mean hours between failures of one node; None is `GPU_HOURS_PER_FAILURE` over its GPUs."""
    restart: float = RESTART_SECONDS
    """Seconds from a failure to the next step."""
    checkpoint: float | None = None
    """Seconds that a checkpoint holds training up; None is the copy of its snapshot to the host, which is all that a
    checkpoint written in the background holds up."""
    storage: float = STORAGE_BYTES
    """Bytes per second that all ranks together write: a checkpoint waits until the one before is on disk."""


@dataclass(frozen=True)
class Simulated:
    """A run on `gpus` GPUs."""

    gpus: int
    fits: bool | None
    peak: float
    """Bytes of a rank at its highest."""
    step: StepTime
    tokens_per_second: float
    """Of one GPU, in steps alone."""
    mfu: float
    """FLOP/s of the model over the peak, in steps alone."""
    between_failures: float
    """Mean seconds between failures of the job."""
    checkpoint: float
    """Seconds that a checkpoint holds training up."""
    interval: float
    """Recommended seconds of work between checkpoints, a whole number of steps: Daly's, or until one is written."""
    goodput: float
    """Share of the time in which training goes forward."""
    run: float
    """Seconds of the whole run with checkpoints and failures; infinite when they let nothing through."""

    @property
    def steps_between(self) -> int:
        """Steps between checkpoints."""
        return round(self.interval / self.step.total)


def simulate(planner: Planner, layout: Layout, tokens: float, faults: Faults) -> tuple[Simulated | None, str]:
    """(a run of `tokens` tokens in `layout`, how its time was estimated); (None, why there is no time)."""
    plan: Plan = planner.plan(layout)
    if plan.time is None or planner.machine is None:
        return None, plan.basis
    machine, cfg = planner.machine, layout.cfg
    peak, _ = peak_of(machine.gpu.device, cfg.train.precision)
    assert peak is not None
    per_step = cfg.train.global_batch_size * cfg.data.sequence_length
    speed = per_step / plan.time.total / layout.world
    node_hours = faults.node_hours or GPU_HOURS_PER_FAILURE / machine.node
    between = time_between_failures(layout.world, machine.node, node_hours)
    held = plan.memory.snapshot / HOST_BYTES if faults.checkpoint is None else faults.checkpoint
    written = plan.memory.snapshot * layout.world / faults.storage
    steps = max(1, math.floor(daly(held, between) / plan.time.total), math.ceil(written / plan.time.total))
    interval = steps * plan.time.total
    share = goodput(interval, held, faults.restart, between)
    seconds = tokens / per_step * plan.time.total
    return Simulated(
        gpus=layout.world,
        fits=planner.fits(plan),
        peak=plan.memory.peak.total,
        step=plan.time,
        tokens_per_second=speed,
        mfu=speed * flops(layout, planner.tracer.shapes)[0] / peak,
        between_failures=between,
        checkpoint=held,
        interval=interval,
        goodput=share,
        run=seconds / share if share else math.inf,
    ), plan.basis
