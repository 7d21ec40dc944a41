"""`nexa law ladder`: small versions of a run are planned, trained and fitted, and the loss of the run is predicted."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexa.errors import UserError

if TYPE_CHECKING:
    from nexa.config.schema import Config
    from nexa.scaling.sizes.ladder import Rung

TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def add_parser(commands: Any) -> None:
    """Add the command to those of `nexa law`."""
    parser = commands.add_parser(
        "ladder",
        help="small runs from which a large one is predicted: plan, train, fit, predict",
        description="Smaller versions of a run, of several sizes and lengths. Without --run and --out their commands "
        "are printed. --run trains what has not finished, one after the other; --out fits the runs, writes the law and "
        "prints it with the predicted loss of the large run as JSON.",
    )
    add = parser.add_argument
    add("overrides", nargs="+", metavar="key=value", help="+exp=NAME and overrides of the large run, as for train.py")
    add("--shares", nargs="+", type=float, default=[0.25, 0.375, 0.5], metavar="S", help="of its width and depth")
    add("--tokens-per-parameter", nargs="+", type=float, default=[10, 20, 40], metavar="X", help="default: 10 20 40")
    add("--name", default="ladder", metavar="NAME", help="beginning of run.name (default: ladder)")
    add("--run", action="store_true", help="train the runs that have not finished; output goes to <run folder>.log")
    add("--launcher", default="python", metavar="WORDS", help='such as "torchrun --nproc-per-node 8" (default: python)')
    add("--out", metavar="FILE", help="scaling.json to write, when all runs have finished")
    add("--loss", default="loss", metavar="KEY", help="key of metrics.jsonl (default: loss)")
    add("--tied", action="store_true", help="alpha = beta, as in nexa law scaling fit")
    add("--bootstrap", type=int, default=0, metavar="N", help="replicates for intervals (default: 0, none)")
    add("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)")
    parser.set_defaults(handler=ladder)


def _note(text: str) -> None:
    print(f"nexa law ladder: {text}", file=sys.stderr, flush=True)


def ladder(arguments: argparse.Namespace) -> int:
    """Print commands, or train, fit and predict. Raises UserError."""
    from nexa.scaling.sizes import ladder as sizes
    from nexa.scaling.sizes.chinchilla import fewest

    large, rungs = sizes.plan(arguments.overrides, arguments.shares, arguments.tokens_per_parameter, arguments.name)
    if not (arguments.run or arguments.out):
        for rung in rungs:
            print(shlex.join(["python", "train.py", *rung.words]))
        return 0
    least = fewest(arguments.tied)
    if arguments.out and len(rungs) < least:
        raise UserError(f"{len(rungs)} runs; the law needs {least}: give more --shares or --tokens-per-parameter")
    waiting = [rung for rung in rungs if not _finished(rung.cfg)]
    if arguments.run:
        for count, rung in enumerate(waiting, start=1):
            _train(shlex.split(arguments.launcher), rung, f"{count} of {len(waiting)}")
    elif waiting:
        names = ", ".join(rung.cfg.run.dir for rung in waiting)
        raise UserError(f"{len(waiting)} of {len(rungs)} runs have not finished ({names}); train them, or give --run")
    if arguments.out:
        _fit(arguments, [rung.cfg for rung in rungs], large)
    return 0


def _finished(cfg: Config) -> bool:
    """Whether the run has its last step. Raises UserError when its folder is that of another run."""
    from nexa.config.files import load
    from nexa.scaling.sizes.runs import describe, steps_done

    folder = Path(cfg.run.dir)
    if not (folder / "config.yaml").exists():
        return False
    if describe(load(folder)) != describe(cfg):
        raise UserError(f"{folder}: is a run with other settings than this ladder's; give another --name, or remove it")
    return steps_done(folder) >= cfg.total_steps


def _train(launcher: list[str], rung: Rung, which: str) -> None:
    """One run, to its end or from where it was stopped. Raises UserError when it fails."""
    cfg = rung.cfg
    log = Path(f"{cfg.run.dir}.log")
    _note(f"run {which}: {cfg.run.dir}, {cfg.total_steps} steps; output in {log}")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable if word == "python" else word for word in launcher] + [str(TRAIN), *rung.words]
    try:
        with log.open("a") as out:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
    except OSError as error:
        raise UserError(f"--launcher {shlex.join(launcher)}: {error.strerror}") from error
    if code or not _finished(cfg):
        raise UserError(f"{cfg.run.dir}: train.py ended with code {code} before the last step; see {log}")


def _fit(arguments: argparse.Namespace, configs: list[Config], large: Config) -> None:
    """Fit the finished runs, write the law, print it with the prediction."""
    import numpy as np

    from nexa.scaling.laws.files import to_json, write
    from nexa.scaling.sizes import files, runs
    from nexa.scaling.sizes.chinchilla import fit

    points = [runs.from_run(Path(cfg.run.dir), arguments.loss) for cfg in configs]
    sizes, tokens, losses = (np.array([getattr(p, key) for p in points]) for key in ("parameters", "tokens", "loss"))
    found = fit(sizes, tokens, losses, tied=arguments.tied, bootstrap=arguments.bootstrap, seed=arguments.seed)
    document = files.scaling_document(found, len(points), (sizes.max(), tokens.max()))
    write(arguments.out, to_json(document))
    facts = runs.describe(large)
    samples = [float(sample.loss(facts.size, facts.tokens)) for sample in found.samples]
    fitted = np.asarray(found.law.loss(sizes, tokens))
    rows = [vars(point) | {"fitted": float(value)} for point, value in zip(points, fitted, strict=True)]
    predicted = {
        "parameters": facts.size,
        "tokens": facts.tokens,
        "loss": float(found.law.loss(facts.size, facts.tokens)),
        "interval": found.interval(samples) if samples else None,
    }
    beyond = {"parameters": facts.size / sizes.max(), "tokens": facts.tokens / tokens.max()}
    print(to_json({"runs": rows, "params": document["params"], "large": predicted, "times_beyond": beyond}), end="")
    _note(f"wrote {arguments.out}")
