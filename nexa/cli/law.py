"""`nexa law`: fit loss-curve laws to runs, predict the loss of a schedule, compare laws, choose a schedule."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexa.cli import law_sizes
from nexa.errors import UserError

if TYPE_CHECKING:
    from nexa.scaling.laws.base import Law
    from nexa.scaling.laws.curves import Curve
    from nexa.scaling.laws.files import Fitted

ABOUT = """
What loss does a learning-rate schedule lead to? A law, fitted to curves of a few runs, says it for others of the same
model, batch and data.

SPEC is a run folder (its config.yaml says the schedule, its metrics.jsonl the loss) or a YAML file:

  curves:
    - path: cosine.csv                # columns step,lr,loss; relative to this file
      schedule: {name: cosine, peak_lr: 3.0e-4, min_lr: 3.0e-5, warmup_steps: 2160, total_steps: 24000}
    - name: planned                   # no path: only to be predicted
      schedule: {name: wsd, peak_lr: 3.0e-4, min_lr: 0, decay_fraction: 0.1, warmup_steps: 2160, total_steps: 24000}

  nexa law fit runs/cosine runs/constant --law annealing --bootstrap 100 --out law.json
  nexa law predict law.json planned.yaml --out predictions
  nexa law compare train.yaml --test test.yaml
  nexa law plot law.json train.yaml --out law.svg        # or law.html: a page with everything
  nexa law schedule law.json --total-steps 24000 --warmup-steps 500 --peak-lr 3e-4 --out conf/schedule/best.yaml
  nexa law scaling optimum besiroglu --flops 1e21
  nexa law mixture best mixture.json

scaling, mixture and ladder are laws of size and data; the others are of schedules.
"""
LAW_NAMES = (
    "annealing",
    "multipower",
    "annealing_size",
    "forward_momentum",
    "continual",
    "continual_replay",
    "continual_size",
)
WARMUPS = ("official", "interpretable")


def add_parser(subparsers: Any) -> None:
    """Add the `law` command and its own."""
    form = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "law", help="loss by schedule, size and data: fit, predict, choose", description=ABOUT, formatter_class=form
    )
    commands = parser.add_subparsers(dest="law_command", metavar="COMMAND", required=True)
    _fit_parser(commands)
    _predict_parser(commands)
    _compare_parser(commands)
    _plot_parser(commands)
    _schedule_parser(commands)
    law_sizes.add_parsers(commands)


def _specs(add: Any) -> None:
    add("specs", nargs="+", metavar="SPEC", help="YAML files of curves, or run folders")
    add("--loss", default="loss", metavar="KEY", help="key of metrics.jsonl in run folders (default: loss)")


def _fitting(add: Any) -> None:
    """Options of fits."""
    add("--lambda", dest="momentum", default="profile", metavar="X", help="of annealing (default: chosen by the fit)")
    add("--warmup", choices=WARMUPS, help="of multipower: whether warm-up's rises count (official, the default) or not")
    add("--prior", type=float, metavar="X", help="pull to usual shapes; 0: none; default: the law's own (docs/laws.md)")
    add("--bootstrap", type=int, default=0, metavar="N", help="replicates for intervals (default: 0, none)")
    add("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)")


def _fit_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "fit", help="fit a law to curves", description="Fit a law; writes FILE, prints a summary."
    )
    _specs(parser.add_argument)
    parser.add_argument("--law", choices=LAW_NAMES, default="annealing", help="default: annealing")
    parser.add_argument("--out", required=True, metavar="FILE", help="law.json to write")
    _fitting(parser.add_argument)
    parser.set_defaults(handler=fit)


def _predict_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "predict",
        help="predict curves with a law",
        description="Writes DIR/<file name of the curve> with step,lr,loss,predicted and prints the errors as JSON.",
    )
    parser.add_argument("law", metavar="LAW", help="law.json")
    _specs(parser.add_argument)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--extrapolate", action="store_true", help="predict even where the law is known to be wrong")
    parser.set_defaults(handler=predict)


def _compare_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="compare laws on curves that they were not fitted on",
        description="Fit each law and measure it on --test; without it, on each curve in turn, left out of the fit.",
    )
    _specs(parser.add_argument)
    parser.add_argument(
        "--laws", nargs="+", choices=LAW_NAMES, default=LAW_NAMES[:2], help="default: annealing multipower"
    )
    parser.add_argument("--test", nargs="+", metavar="SPEC", help="curves to measure on")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _fitting(parser.add_argument)
    parser.set_defaults(handler=compare)


def _plot_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plot", help="figure of curves, law and residuals", description="Draw curves with a law."
    )
    parser.add_argument("law", metavar="LAW", help="law.json")
    _specs(parser.add_argument)
    parser.add_argument("--out", required=True, metavar="FILE", help="figure: .svg, .pdf or .png; or a page: .html")
    parser.add_argument("--extrapolate", action="store_true", help="draw even where the law is known to be wrong")
    parser.set_defaults(handler=plot)


def _schedule_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "schedule",
        help="the schedule that the law thinks best",
        description="Find the schedule with the lowest final loss that never rises after warm-up, and write it as an "
        "option of config group schedule; prints its predicted loss and those of usual schedules as JSON.",
    )
    add = parser.add_argument
    add("law", metavar="LAW", help="law.json")
    add("--total-steps", type=int, required=True, metavar="N", help="steps of the run, warm-up included")
    add("--peak-lr", type=float, required=True, metavar="X", help="learning rate after warm-up")
    add("--warmup-steps", type=int, metavar="N", help="default: 1 %% of all steps")
    add(
        "--min-lr", type=float, metavar="X", help="lowest rate allowed (default: the lowest that the law was fitted on)"
    )
    add("--parameters", type=float, metavar="N", help="of the model, for annealing_size")
    add(
        "--out",
        metavar="FILE",
        help="YAML to write, such as conf/schedule/best.yaml; default: standard output after JSON",
    )
    add("--extrapolate", action="store_true", help="also for a peak beyond what the law was fitted on")
    parser.set_defaults(handler=schedule)


def _note(text: str) -> None:
    print(f"nexa law: {text}", file=sys.stderr, flush=True)


def _make(name: str, arguments: argparse.Namespace) -> tuple[Law, dict[str, Any]]:
    """The law that the options of `_fitting` ask for, and the options of its fit. Raises UserError."""
    from nexa.scaling.laws import LAWS

    for key in ("prior", "bootstrap", "seed"):
        value = getattr(arguments, key)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{key} {value}: give a number of at least 0")
    law = LAWS[name]
    made = law(**({} if arguments.warmup is None or "warmup" not in law.options else {"warmup": arguments.warmup}))
    options = {"prior": arguments.prior, "bootstrap": arguments.bootstrap, "seed": arguments.seed}
    if "lambda" not in made.fixed or arguments.momentum == "profile":
        return made, options | {"profile": "lambda" in made.fixed}
    try:
        value = float(arguments.momentum)
    except ValueError as error:
        raise UserError(f"--lambda {arguments.momentum}: give a number from 0 to below 1, or profile") from error
    return made.with_fixed(**{"lambda": value}), options


def _line(entry: dict[str, Any]) -> str:
    """One curve of a summary."""
    return (
        f"  {entry['path']:<40} MAE {entry['mae']:.5f}  mean {entry['mean_relative_error']:.3%}  "
        f"worst {entry['worst_relative_error']:.3%}  R2 {entry['r2']:.5f}"
    )


def fit(arguments: argparse.Namespace) -> int:
    """Fit, write law.json, print parameters and errors. Raises UserError."""
    from nexa.scaling.laws import curves, files
    from nexa.scaling.laws.fit import fit as fit_law

    law, options = _make(arguments.law, arguments)
    loaded = curves.load(arguments.specs, arguments.loss)
    found = fit_law(law, loaded, **options, note=_note)
    document = files.document(found, loaded)
    files.write(arguments.out, files.to_json(document))
    for warning in found.warnings:
        _note(f"warning: {warning}")
    intervals = found.intervals()
    print(f"{law.name}: {found.rows} rows, {found.seconds:.1f} s, condition number {found.condition:.3g}")
    for name, value in found.params.items():
        between = f"  ({intervals[name][0]:.5g} to {intervals[name][1]:.5g})" if name in intervals else ""
        print(f"  {name:<7} {value:.6g}{between}")
    print("\n".join(_line(entry) for entry in document["curves"]))
    print(f"wrote {arguments.out}")
    return 0


def _allowed(fitted: Fitted, loaded: Sequence[Curve], extrapolate: bool) -> list[str]:
    """Remarks on all curves; UserError when the law is known to be wrong on one and `extrapolate` is not set."""
    from nexa.scaling.laws.limits import overlooked, refusals, remarks

    found = []
    for curve in loaded:
        refused = refusals(fitted.law, fitted.seen, curve.rates)
        if refused and not extrapolate:
            raise UserError(f"{curve.path}: {'; '.join(refused)}. --extrapolate predicts all the same")
        said = [*refused, *remarks(fitted.seen, curve.rates), *overlooked(fitted.law, curve.rates), *curve.notes]
        found += [f"{curve.path}: {text}" for text in said]
    for text in found:
        _note(f"warning: {text}")
    return found


def predict(arguments: argparse.Namespace) -> int:
    """Write predictions, print errors as JSON. Raises UserError."""
    from nexa.scaling.laws import curves, files
    from nexa.scaling.laws.fit import score

    fitted, loaded = files.read(arguments.law), curves.load(arguments.specs, arguments.loss)
    warnings = _allowed(fitted, loaded, arguments.extrapolate)
    entries = []
    for curve in loaded:
        predicted, interval = fitted.predict(curve), fitted.interval(curve)
        files.write(Path(arguments.out) / curve.file, files.prediction_csv(curve, predicted))
        entry = score(fitted.law, fitted.params, curve) | {
            "final_step": int(curve.step[-1]),
            "final": float(predicted[-1]),
        }
        if interval is not None:
            entry["final_interval"] = [float(interval[0][-1]), float(interval[1][-1])]
        entries.append(entry)
    print(files.to_json({"law": fitted.law.name, "curves": entries, "warnings": warnings}), end="")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Fit each law, print its errors on held-out curves. Raises UserError."""
    from nexa.scaling.laws import curves, files
    from nexa.scaling.laws.compare import held_out

    loaded = curves.load(arguments.specs, arguments.loss)
    test = curves.load(arguments.test, arguments.loss) if arguments.test else None
    result = {}
    for name in arguments.laws:
        law, options = _make(name, arguments)
        result[name] = held_out(law, loaded, test, **options)
        for warning in result[name]["warnings"]:
            _note(f"warning: {name}: {warning}")
    if arguments.json:
        print(files.to_json({"laws": result}), end="")
        return 0
    for name, entry in result.items():
        print(f"{name}: mean MAE {entry['mean']['mae']:.5f} on held-out curves, {entry['seconds']:.1f} s")
        print("\n".join(_line(curve) for curve in entry["curves"]))
    return 0


def plot(arguments: argparse.Namespace) -> int:
    """Draw. Raises UserError."""
    from nexa.scaling.laws import curves, files, page
    from nexa.scaling.laws.figures import draw

    fitted, loaded = files.read(arguments.law), curves.load(arguments.specs, arguments.loss)
    warnings = _allowed(fitted, loaded, arguments.extrapolate)
    if Path(arguments.out).suffix == ".html":
        page.write(arguments.out, fitted, loaded, warnings)
    else:
        draw(arguments.out, fitted, loaded)
    print(f"wrote {arguments.out}")
    return 0


def schedule(arguments: argparse.Namespace) -> int:
    """Optimise, write the schedule, print predictions as JSON. Raises UserError."""
    from nexa.scaling.laws import files
    from nexa.scaling.laws.limits import refusals, remarks
    from nexa.scaling.laws.optimise import optimise, to_yaml, trainers_rates

    fitted, total, peak = files.read(arguments.law), arguments.total_steps, arguments.peak_lr
    if fitted.law.needs_size and not arguments.parameters:
        raise UserError(f"law {fitted.law.name}: needs --parameters")
    lowest = min(fitted.seen.lowest_lr, peak) if fitted.seen else 0.0
    lowest = lowest if arguments.min_lr is None else arguments.min_lr
    warmup = max(1, total // 100) if arguments.warmup_steps is None else arguments.warmup_steps
    best = optimise(fitted, total, peak, warmup, lowest / peak if peak else 0.0, arguments.parameters)
    rates = trainers_rates(best.schedule, total, peak)
    refused = refusals(fitted.law, fitted.seen, rates)
    if refused and not arguments.extrapolate:
        raise UserError(
            f"--peak-lr {peak:g} --min-lr {lowest:g}: {'; '.join(refused)}. --extrapolate goes on all the same"
        )
    warnings = [*refused, *remarks(fitted.seen, rates)]
    for text in warnings:
        _note(f"warning: {text}")
    text = to_yaml(best, total, peak, f"{arguments.law} ({fitted.law.name})")
    if arguments.out:
        files.write(arguments.out, text)
    print(json.dumps({"predicted": best.predicted, "others": best.others, "warnings": warnings}, indent=1))
    if not arguments.out:
        print(text, end="")
        return 0
    _note(f"wrote {arguments.out}; as conf/schedule/{Path(arguments.out).name} it is run with")
    _note(f"python train.py schedule={Path(arguments.out).stem} train.steps={total} optim.lr={peak:g} …")
    return 0
