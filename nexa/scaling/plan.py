"""A plan: memory, time and cost of a layout, what to change when it does not fit, and the quickest that does."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nexa.config.schema import Config
from nexa.scaling.layout import Layout
from nexa.scaling.memory import Memory, memory
from nexa.scaling.step_time import GPUS_PER_NODE, Machine, StepTime, step_time
from nexa.scaling.trace import Tracer

CHECKPOINTING = ("none", "selective", "full")
SEARCHED = (
    "parallel.zero_stage",
    "parallel.tensor",
    "parallel.sequence",
    "train.micro_batch_size",
    "train.activation_checkpointing",
)
SECONDS_PER_HOUR = 3600
ALIKE = 0.03
"""Step times that differ by less are alike: the estimate cannot tell them apart."""
Changes = dict[str, Any]
"""Configuration key -> value."""
Arrange = Callable[[Config], Layout | None]
"""How the engine would run a configuration; None when it is not valid."""


@dataclass(frozen=True)
class Limit:
    """Memory that a plan may use."""

    capacity: float | None
    """Bytes of one GPU; None when it is not known."""
    margin: float
    """Share of it to leave free: CUDA context, communication library, fragmentation."""

    def holds(self, need: float) -> bool | None:
        """Whether `need` bytes fit; None when the capacity is not known."""
        return None if self.capacity is None else need <= self.capacity * (1 - self.margin)


@dataclass(frozen=True)
class Plan:
    """One layout with its memory and, where the device is known, its time."""

    layout: Layout
    memory: Memory
    time: StepTime | None
    basis: str
    """What the time was estimated from, or why it was not."""


class Planner:
    """Plans for one model, whatever its layout."""

    def __init__(self, cfg: Config, arrange: Arrange, limit: Limit, machine: Machine | None) -> None:
        """machine: None when the GPU is not known; there are no times then."""
        self.cfg, self.arrange, self.limit, self.machine = cfg, arrange, limit, machine
        self.tracer = Tracer(cfg.model, cfg.norm)

    def plan(self, layout: Layout) -> Plan:
        """Memory and time of `layout`."""
        time, basis = (None, "no figures for this GPU")
        if self.machine is not None:
            time, basis = step_time(layout, self.machine, self.tracer)
        return Plan(layout, memory(layout, self.tracer), time, basis)

    def fits(self, plan: Plan) -> bool | None:
        """Whether the peak fits; None when the capacity is not known."""
        return self.limit.holds(plan.memory.peak.total)

    def _with(self, changes: Changes) -> Plan | None:
        layout = self.arrange(changed(self.cfg, changes))
        return None if layout is None else self.plan(layout)

    def single_changes(self, layout: Layout) -> Iterator[tuple[Changes, Plan]]:
        """For each key that lowers the peak by itself, the mildest value that fits, else the one that saves most.

        Sequence parallelism comes with its tensor parallelism.
        """
        before = self.plan(layout).memory.peak.total
        for _, family in itertools.groupby(one_key(layout), key=tuple):
            found: tuple[Changes, Plan] | None = None
            for changes in family:
                plan = self._with(changes)
                if plan is None or plan.memory.peak.total >= before:
                    continue
                if found is None or plan.memory.peak.total < found[1].memory.peak.total:
                    found = changes, plan
                if self.fits(plan):
                    break
            if found is not None:
                yield found

    def quickest(self, layout: Layout) -> tuple[Changes, Plan] | None:
        """The layout on as many GPUs that fits and has the shortest step; None when none fits.

        The global batch stays, so training is the same. Among those within `ALIKE` of the shortest, and without
        times among all, the one with least recomputation and sharding, then with the largest micro-batch.
        """
        fitting = [(changes, plan) for changes, plan in self._every(layout) if self.fits(plan)]
        shortest = min((_seconds(plan) for _, plan in fitting), default=0.0)
        alike = [pair for pair in fitting if _seconds(pair[1]) <= shortest * (1 + ALIKE)]
        return min(alike, key=lambda pair: _effort(pair[1].layout), default=None)

    def _every(self, layout: Layout) -> Iterator[tuple[Changes, Plan]]:
        for changes in every_layout(layout):
            plan = self._with(changes)
            if plan is not None:
                yield changes, plan


def _seconds(plan: Plan) -> float:
    return 0.0 if plan.time is None else plan.time.total


def _effort(layout: Layout) -> tuple[int, ...]:
    """What is done to make a layout fit, the worst first."""
    cfg = layout.cfg
    recomputed = CHECKPOINTING.index(cfg.train.activation_checkpointing)
    sharded = layout.tensor, layout.stage, int(cfg.parallel.sequence)
    # stages that the engine replaces by the same other one: name the one it uses
    replaced = int(cfg.parallel.zero_stage != layout.stage)
    return recomputed, *sharded, -cfg.train.micro_batch_size, replaced


def changed(cfg: Config, changes: Changes) -> Config:
    """A copy of `cfg` with these values."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        group, name = key.split(".")
        groups.setdefault(group, {})[name] = value
    replaced = {group: dataclasses.replace(getattr(cfg, group), **values) for group, values in groups.items()}
    return dataclasses.replace(cfg, **replaced)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _tensor_sizes(world: int) -> list[int]:
    """Tensor parallelism stays inside a node."""
    return [n for n in _divisors(world) if n <= GPUS_PER_NODE]


def one_key(layout: Layout) -> Iterator[Changes]:
    """Changes that may save memory, those of one key together and the mildest first."""
    cfg, world = layout.cfg, layout.world
    share = cfg.train.global_batch_size // layout.data
    for micro in reversed([n for n in _divisors(share) if n < cfg.train.micro_batch_size]):
        yield {"train.micro_batch_size": micro}
    for stage in range(cfg.parallel.zero_stage + 1, 4):
        yield {"parallel.zero_stage": stage}
    for how in CHECKPOINTING[CHECKPOINTING.index(cfg.train.activation_checkpointing) + 1 :]:
        yield {"train.activation_checkpointing": how}
    if cfg.train.loss_chunk_tokens > 512:
        yield {"train.loss_chunk_tokens": 512}
    if cfg.parallel.tensor > 1 and not cfg.parallel.sequence:
        yield {"parallel.sequence": True}
    for tensor in _tensor_sizes(world):
        if tensor > cfg.parallel.tensor:
            yield {"parallel.tensor": tensor, "parallel.sequence": True}
    if cfg.train.precision == "fp32":
        yield {"train.precision": "bf16"}


def every_layout(layout: Layout) -> Iterator[Changes]:
    """All values of `SEARCHED` on as many GPUs."""
    cfg = layout.cfg
    for tensor in _tensor_sizes(layout.world):
        share, rest = divmod(cfg.train.global_batch_size, layout.world // tensor)
        micros = [] if rest else _divisors(share)
        sequence = [False, True] if tensor > 1 else [False]
        for values in itertools.product(range(4), [tensor], sequence, micros, CHECKPOINTING):
            yield dict(zip(SEARCHED, values, strict=True))
