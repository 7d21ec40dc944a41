"""From the command line of submit.py to a job in the queue."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.arguments import parser
from launch.containers import enter
from launch.script import Job, Run, render
from launch.slurm import send
from nexa.checkpoint.catalog import directory_name, is_complete
from nexa.config import check, compose
from nexa.config.schema import Config
from nexa.errors import ConfigError, UserError

REPOSITORY = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str]) -> None:
    """Check, show, send. Raises UserError for what a user can mend."""
    arguments = parser().parse_intermixed_args(list(argv))
    job = make_job(arguments)
    script = render(job)
    print(script, end="", flush=True)
    if arguments.dry_run:
        return
    if all(is_complete(run.folder / "checkpoints" / run.last_checkpoint) for run in job.runs):
        folders = ", ".join(str(run.folder) for run in job.runs)
        print(f"{folders}: finished ({job.runs[-1].last_checkpoint}); nothing was submitted")
        return
    send(job, script)


def make_job(arguments: argparse.Namespace) -> Job:
    """What the command line asks for. Raises UserError (ConfigError) for options and configurations that cannot be."""
    processes = arguments.gpus_per_node or arguments.processes_per_node or 1
    if arguments.gpus_per_node and arguments.processes_per_node:
        raise UserError("--processes-per-node: is for nodes without GPUs; with GPUs there is one rank for each")
    if arguments.time and _seconds(arguments.time) <= arguments.signal_before:
        raise UserError(
            f"--signal-before={arguments.signal_before}: is not shorter than --time={arguments.time}; "
            "the run would be told to stop before it starts"
        )
    overrides = tuple(arguments.overrides)
    tasks = _tasks(overrides, arguments.array)
    configs = [checked(words, arguments.nodes * processes) for words in tasks]
    runs = tuple(_run(words, cfg) for words, cfg in zip(tasks, configs, strict=True))
    visible = [Path.cwd(), REPOSITORY, *(run.folder.parent for run in runs), *map(Path, arguments.bind)]
    container: tuple[str, ...] = ()
    if arguments.container:
        container = enter(arguments.container_runtime, arguments.container, visible, arguments.gpus_per_node > 0)
    return Job(
        directives=_directives(arguments, processes, runs, configs[0].run.name),
        runs=runs,
        processes=processes,
        python=arguments.python or ("python" if container else sys.executable),
        container=container,
        modules=tuple(arguments.module),
        extra_directives=tuple(arguments.sbatch),
        interface=arguments.interface or "",
        port=str(arguments.port or ""),
        at_limit="chain" if arguments.chain else "stop" if arguments.no_requeue else "requeue",
    )


def checked(overrides: Sequence[str], world_size: int) -> Config:
    """The configuration that train.py would make of `overrides`. Raises ConfigError with all problems."""
    if flags := [word for word in overrides if word.startswith("-")]:
        raise UserError(f"{flags[0]}: Hydra's own flags cannot be submitted; say it with key=value")
    cfg = compose(overrides)
    if problems := check(cfg, world_size):
        raise ConfigError(problems)
    return cfg


def _run(overrides: Sequence[str], cfg: Config) -> Run:
    last = min(cfg.total_steps, cfg.train.stop_at or cfg.total_steps)
    return Run((str(REPOSITORY / "train.py"), *overrides), Path.cwd() / cfg.run.dir, directory_name(last))


def _tasks(overrides: tuple[str, ...], arrays: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of each task of an array: every combination of values, each with a run name of its own."""
    if not arrays:
        return [overrides]
    axes: list[list[tuple[str, str]]] = []
    for text in arrays:
        key, sign, values = text.partition("=")
        if not sign or not key or "" in (split := _split(values)):
            raise UserError(f"--array={text}: must be KEY=VALUE,VALUE")
        axes.append([(f"{key}={value}", _label(value, number)) for number, value in enumerate(split)])
    base = compose([*overrides, *(axis[0][0] for axis in axes)]).run.name
    return [
        (*overrides, *(word for word, _ in chosen), f"run.name={'_'.join((base, *(label for _, label in chosen)))}")
        for chosen in itertools.product(*axes)
    ]


def _label(value: str, number: int) -> str:
    """What stands for a value in a run's name."""
    text = re.sub(r"[^\w.+-]+", "-", value).strip("-")
    return text if 0 < len(text) <= 40 else str(number)


def _split(text: str) -> list[str]:
    """Parts of `text` between the commas that are outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[({") - (character in "])}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _directives(arguments: argparse.Namespace, processes: int, runs: Sequence[Run], name: str) -> dict[str, str | None]:
    if len({run.folder for run in runs}) < len(runs):
        raise UserError("--array: the runs would share one folder; set run.name, not run.dir, and no value twice")
    array = len(runs) > 1
    log = (
        _literal(runs[0].folder.parent if array else runs[0].folder) + "/slurm/" + ("%A_%a.log" if array else "%j.log")
    )
    limit = f"%{arguments.at_once}" if arguments.at_once else ""
    found: dict[str, str | None] = {
        "job-name": re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII),
        "chdir": str(Path.cwd()),
        "output": log,
        "open-mode": "append",
        "nodes": str(arguments.nodes),
        "ntasks-per-node": "1",
    }
    if arguments.gpus_per_node:
        found["gpus-per-node"] = str(arguments.gpus_per_node)
    if arguments.cpus_per_process:
        found["cpus-per-task"] = str(arguments.cpus_per_process * processes)
    for option in ("partition", "account", "qos", "time"):
        if value := getattr(arguments, option):
            found[option] = value
    if arguments.memory:
        found["mem"] = arguments.memory
    if array:
        found["array"] = f"0-{len(runs) - 1}{limit}"
    found["signal"] = f"B:USR1@{arguments.signal_before}"
    found["no-requeue" if arguments.no_requeue else "requeue"] = None
    return found


def _literal(folder: Path) -> str:
    """A folder in a pattern of sbatch, where % has a meaning and a backslash takes all meaning away."""
    if "\\" in str(folder):
        raise UserError(f"run.dir={folder}: sbatch writes no log into a folder with a backslash; rename it")
    return str(folder).replace("%", "%%")


def _seconds(text: str) -> int:
    """Seconds of a time limit in one of Slurm's notations: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, _, rest = text.rpartition("-")
    numbers = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
