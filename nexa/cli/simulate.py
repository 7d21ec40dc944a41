"""`nexa plan --simulate 8,64,512 …`: a run on each of several numbers of GPUs, failures and checkpoints included."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from nexa.errors import ConfigError

if TYPE_CHECKING:
    from nexa.config.schema import Config
    from nexa.scaling.plan import Planner
    from nexa.scaling.simulate import Simulated

HOUR, DAY = 3600, 86400
COLUMNS = (
    ("GPUs", 7),
    ("step", 10),
    ("compute", 8),
    ("reduce", 7),
    ("gather", 7),
    ("tensor", 7),
    ("waits", 6),
    ("tok/s/GPU", 10),
    ("MFU", 6),
    ("fails every", 12),
    ("save every", 18),
    ("goodput", 8),
    ("days", 8),
    ("GPU hours", 11),
    ("memory", 14),
)


def counts(text: str) -> list[int]:
    """`8,64,512` as numbers. Raises argparse.ArgumentTypeError for anything else."""
    words = text.split(",")
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text}: must be numbers of GPUs with commas, for example 8,64,512")
    return [int(word) for word in words]


def add_flags(
    parser: argparse.ArgumentParser,
    positive: Callable[[str], float],
    share: Callable[[str], float],
    count: Callable[[str], int],
) -> None:
    """Add the flags of a simulation to `nexa plan`."""
    group = parser.add_argument_group("simulation of many GPUs (docs/simulate.md)")
    group.add_argument("--simulate", type=counts, metavar="N,N,…", help="a table over these numbers of GPUs")
    group.add_argument(
        "--scaling",
        choices=("strong", "weak"),
        default="strong",
        help="strong keeps the global batch (default); weak lets it grow from that on --gpus GPUs",
    )
    group.add_argument("--gpus-per-node", type=count, default=8, metavar="N", help="GPUs of a node (default 8)")
    group.add_argument(
        "--variation",
        type=share,
        default=0.01,
        metavar="S",
        help="standard deviation of a rank's time over its mean; a step waits for the slowest (default 0.01)",
    )
    group.add_argument(
        "--node-failure-hours", type=positive, metavar="X", help="mean hours between failures of a node (default 6,334)"
    )
    group.add_argument(
        "--restart-minutes", type=positive, default=10.0, metavar="X", help="from a failure to the next step (10)"
    )
    group.add_argument(
        "--checkpoint-seconds",
        type=positive,
        metavar="X",
        help="time that a checkpoint holds training up (default: its copy to the host's memory)",
    )
    group.add_argument(
        "--storage-gbs",
        type=positive,
        default=10.0,
        metavar="X",
        help="GB/s that all ranks together write (default 10)",
    )


def report(
    cfg: Config, arguments: argparse.Namespace, planner: Planner, problems: Callable[[Config, int], list[str]]
) -> dict[str, Any]:
    """The simulation as one JSON object; sizes in bytes, times in seconds; `why` in place of what cannot run.

    Raises ConfigError when none of the numbers of GPUs can run it.
    """
    from nexa.cli.plan import layout_of
    from nexa.scaling.simulate import Faults, simulate

    per_step = cfg.train.global_batch_size * cfg.data.sequence_length
    tokens = per_step * cfg.total_steps
    faults = Faults(
        arguments.node_failure_hours,
        arguments.restart_minutes * 60,
        arguments.checkpoint_seconds,
        arguments.storage_gbs * 1e9,
    )
    rows, basis = [], None
    for gpus in arguments.simulate:
        sized, wrong = _sized(cfg, gpus, arguments)
        wrong = wrong or problems(sized, gpus)
        if wrong:
            rows.append({"gpus": gpus, "why": wrong[0]})
            continue
        found, how = simulate(planner, layout_of(sized, gpus), tokens, faults)
        if found is None:
            raise ConfigError([f"--gpu {arguments.gpu}: {how}"])
        basis = how
        rows.append(_row(found, sized, arguments.price_per_hour))
    if basis is None:
        raise ConfigError([f"--simulate {row['gpus']}: {row['why']}" for row in rows])
    return {
        "run": {"name": cfg.run.name, "tokens": tokens, "precision": cfg.train.precision, "scaling": arguments.scaling},
        "gpu": arguments.gpu,
        "basis": basis,
        "rows": rows,
    }


def _sized(cfg: Config, gpus: int, arguments: argparse.Namespace) -> tuple[Config, list[str]]:
    """(`cfg` with the global batch for so many GPUs, what is wrong with that)."""
    if arguments.scaling == "strong":
        return cfg, []
    batch, rest = divmod(cfg.train.global_batch_size * gpus, arguments.gpus)
    if rest or not batch:
        text = f"train.global_batch_size={cfg.train.global_batch_size} on --gpus {arguments.gpus}"
        return cfg, [f"{text} is no whole number of sequences on {gpus}"]
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, global_batch_size=batch)), []


def _row(found: Simulated, cfg: Config, price: float | None) -> dict[str, Any]:
    finite = math.isfinite(found.run)
    hours = found.run / HOUR * found.gpus if finite else None
    return {
        "gpus": found.gpus,
        "global_batch_size": cfg.train.global_batch_size,
        "fits": found.fits,
        "peak": round(found.peak),
        "step": found.step.total,
        "parts": dataclasses.asdict(found.step),
        "tokens_per_second_per_gpu": found.tokens_per_second,
        "mfu": found.mfu,
        "between_failures": found.between_failures,
        "checkpoint": found.checkpoint,
        "checkpoint_every": found.interval,
        "checkpoint_every_steps": found.steps_between,
        "goodput": found.goodput,
        "run": found.run if finite else None,
        "gpu_hours": hours,
        "cost": None if price is None or hours is None else hours * price,
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The table for a reader."""
    run = found["run"]
    yield (
        f"{run['name']}: {run['tokens'] / 1e9:,.3g}B tokens in {run['precision']} on {found['gpu']}, {run['scaling']} "
        f"scaling"
    )
    yield ""
    yield "".join(f"{name:>{width}}" for name, width in COLUMNS)
    for row in found["rows"]:
        if "why" in row:
            yield f"{row['gpus']:>7,}  {row['why']}"
        else:
            yield "".join(f"{cell:>{width}}" for cell, (_, width) in zip(_cells(row), COLUMNS, strict=True))
    if costs := [f"{row['cost']:,.0f} on {row['gpus']:,}" for row in found["rows"] if row.get("cost") is not None]:
        yield f"cost: {', '.join(costs)}"
    yield ""
    yield "compute to waits: shares of the step; reduce, gather and tensor are communication that nothing hides"
    yield f"an estimate from {found['basis']}"


def _cells(row: dict[str, Any]) -> list[str]:
    parts, step = row["parts"], row["step"]
    shares = [
        parts["compute"] + parts["update"],
        *(parts[name] for name in ("reduce", "gather", "tensor", "straggler")),
    ]
    memory = "" if row["fits"] is None else " fits" if row["fits"] else " TOO BIG"
    return [
        f"{row['gpus']:,}",
        f"{step:.3f} s",
        *(f"{part / step:.1%}" for part in shares),
        f"{row['tokens_per_second_per_gpu']:,.0f}",
        f"{row['mfu']:.1%}",
        _span(row["between_failures"]),
        f"{_span(row['checkpoint_every'])} ({row['checkpoint_every_steps']:,})",
        f"{row['goodput']:.1%}",
        "never" if row["run"] is None else f"{row['run'] / DAY:,.1f}",
        "n/a" if row["gpu_hours"] is None else f"{row['gpu_hours']:,.0f}",
        f"{row['peak'] / 2**30:.0f} GiB{memory}",
    ]


def _span(seconds: float) -> str:
    unit, word = next((pair for pair in ((DAY, "days"), (HOUR, "h"), (60, "min")) if seconds >= 2 * pair[0]), (1, "s"))
    return f"{seconds / unit:,.1f} {word}"


def show(found: dict[str, Any], as_json: bool) -> int:
    """Print a simulation; 1 when it fits on none of the numbers of GPUs, else 0."""
    print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))
    return int(all(row.get("fits") is False for row in found["rows"] if "why" not in row))
