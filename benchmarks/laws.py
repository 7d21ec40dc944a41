"""How well loss-curve laws fit and predict public curves, and how long a fit takes (CPU seconds of one core).

    python -m benchmarks.laws --curves DIR [--only mpl|schaipp2025] [--out laws.json]

DIR has `mpl/csv_{25,100,…}` (curves of thu-yao-01-luo/MultiPowerLaw) and, if there, `schaipp2025` (runs of
fabian-sp/lr-scheduling with index.csv). On the first, laws are fitted on three curves and measured on the other six,
and each strength of the multi-power law's prior on the curves left out among the three: so its default was chosen.
On the second, validation losses of cosine runs predict those of WSD runs of the same model, and the reverse; at most
six runs of a kind. `--only schaipp2025` prints that table alone, in Markdown: mean |r| and mean |r| at the end.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from nexa.errors import UserError
from nexa.scaling.laws import LAWS, Law
from nexa.scaling.laws.compare import held_out
from nexa.scaling.laws.curves import Curve, checked, read_csv
from nexa.scaling.laws.fit import fit, measures, score
from nexa.scaling.laws.rates import from_spec

PEAK, WARMUP = 3e-4, 2160
TRAIN = ("cosine_24000", "constant_24000", "wsdcon_9")
TEST = ("constant_72000", "cosine_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")
PUBLISHED = {
    "25": (3.04045406, 0.52468604, 0.50786857, 363.78751622, 2.06560812, 0.58279013, 0.64142257),
    "100": (2.6514477, 0.60115152, 0.45295811, 437.9464276, 2.13245612, 0.59785199, 0.65523644),
    "400": (2.37474466, 0.65421216, 0.42878731, 523.42464371, 2.02462735, 0.59350493, 0.63472457),
}
"""L0, A, alpha, B, C, beta, gamma of arXiv 2503.12811, by millions of parameters."""
PRIORS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
CROSSED = ("annealing", "multipower")
WAYS = {"cosine to WSD": ("cos", "wsd"), "WSD to cosine": ("wsd", "cos")}
MOST = 6
"""Runs of a kind that are fitted, and that are measured, in each group of the second data set."""


def schedule(name: str) -> dict[str, Any]:
    """The schedule of a file of the first data set."""
    kind, *numbers = name.split("_")
    common = {"peak_lr": PEAK, "min_lr": PEAK / 10, "warmup_steps": WARMUP}
    if kind == "wsdcon":
        low = int(numbers[0]) * 1e-5
        points = [[0, PEAK], [8000, low], [16000, low]]
        return {"name": "piecewise", "points": points, "interpolation": "step", "warmup_steps": WARMUP}
    if kind in ("wsd", "wsdld"):
        shape = {"wsd": "exponential", "wsdld": "linear"}[kind]
        return common | {"name": "wsd", "total_steps": 24000, "decay_fraction": 1 / 6, "decay_shape": shape}
    return common | {"name": kind, "total_steps": int(numbers[0])}


def curves(folder: Path, names: tuple[str, ...]) -> list[Curve]:
    """Files of the first data set."""
    made = []
    for name in names:
        rates, columns = from_spec(schedule(name), name), read_csv(folder / f"{name}.csv")
        made.append(checked(name, f"{name}.csv", rates, columns, offset=0))
    return made


def errors(law: Law, params: dict[str, float], measured: list[Curve]) -> dict[str, float]:
    """Means over curves."""
    entries = [score(law, params, curve) for curve in measured]
    return {key: float(np.mean([entry[key] for entry in entries])) for key in entries[0] if key != "path"}


def fitted(law: Law, train: list[Curve], test: list[Curve], **options: Any) -> dict[str, Any]:
    """One fit: CPU seconds, parameters, errors on the other curves."""
    begin = time.process_time()
    found = fit(law, train, **options)
    seconds = time.process_time() - begin
    return {"seconds": seconds, "params": found.params, "condition": found.condition} | errors(
        found.law, found.params, test
    )


def first_set(folder: Path) -> dict[str, Any]:
    """All fits on one model size."""
    train, test = curves(folder, TRAIN), curves(folder, TEST)
    multipower = LAWS["multipower"]()
    result: dict[str, Any] = {}
    published = PUBLISHED.get(folder.name.removeprefix("csv_"))
    if published:
        result["multipower, published parameters"] = errors(
            multipower, dict(zip(multipower.order, published, strict=True)), test
        )
    result |= {
        "annealing, lambda .999": fitted(LAWS["annealing"](), train, test),
        "annealing": fitted(LAWS["annealing"](), train, test, profile=True),
        "multipower, prior 0": fitted(multipower, train, test, prior=0.0),
        "multipower": fitted(multipower, train, test),
        "multipower, interpretable": fitted(LAWS["multipower"](warmup="interpretable"), train, test),
        "forward_momentum": fitted(LAWS["forward_momentum"](), train, test),
    }
    result["multipower, left out by prior"] = {
        str(prior): held_out(multipower, train, prior=prior)["mean"]["mae"] for prior in PRIORS
    }
    return result


def logged(folder: Path, row: dict[str, str]) -> Curve:
    """Validation losses of a run of the second data set; the rates it logged are compared with the schedule."""
    name, total, fraction = row["file"], int(row["iterations"]), float(row["wsd_fract_decay"] or 0)
    with (folder / f"{name}.train.csv").open() as file:
        rates = {int(line["iter"]): float(line["lr"]) for line in csv.DictReader(file)}
    with (folder / f"{name}.val.csv").open() as file:
        losses = {int(line["iter"]): float(line["val_loss"]) for line in csv.DictReader(file)}
    rates.pop(total, None)  # some runs log 0 there
    common = {"peak_lr": float(row["lr"]), "warmup_steps": int(row["warmup_steps"]), "total_steps": total}
    shapes = {
        "cos": {"name": "cosine", "min_lr": rates[max(rates)]},
        "wsd": {"name": "wsd", "min_lr": 0.0, "decay_fraction": fraction, "decay_shape": row["decay_type"] or "linear"},
    }
    rows = [step for step in losses if step in rates and step >= common["warmup_steps"]]
    columns = {"step": rows, "lr": [rates[step] for step in rows], "loss": [losses[step] for step in rows]}
    made = from_spec(common | shapes[row["scheduler"]], name)
    return checked(name, f"{name}.csv", made, columns, offset=0, size=float(row["params"]))


Runs = dict[str, list[Curve]]
"""By scheduler: cos, wsd."""


def second_groups(folder: Path) -> dict[tuple[str, str, str, str], Runs]:
    """Runs by data, parameters, peak rate of cosine and of WSD.

    The same peak where there is such a pair of groups; sizes that were run with one peak for each schedule have two.
    """
    found: dict[tuple[str, str], dict[tuple[str, str], list[Curve]]] = defaultdict(lambda: defaultdict(list))
    left_out = 0
    with (folder / "index.csv").open() as file:
        for row in csv.DictReader(file):
            if row["scheduler"] not in ("cos", "wsd") or "horizon" in row["file"] or int(row["n_val_points"] or 0) < 10:
                continue
            try:
                curve = logged(folder, row)
            except UserError:  # its logged rates are not those of its index entry
                left_out += 1
                continue
            found[row["dataset"], row["params"]][row["scheduler"], row["lr"]].append(curve)
    print(f"schaipp2025: {left_out} runs left out, whose rates are not those that their entry says", flush=True)
    groups = {}
    for (data, size), by_rate in found.items():
        rates = {kind: [lr for each, lr in by_rate if each == kind] for kind in ("cos", "wsd")}
        both = [(lr, lr) for lr in rates["cos"] if lr in rates["wsd"]]
        for cos, wsd in both or [(cos, wsd) for cos in rates["cos"] for wsd in rates["wsd"]]:
            groups[data, size, cos, wsd] = {"cos": thinned(by_rate["cos", cos]), "wsd": thinned(by_rate["wsd", wsd])}
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], int(item[0][1]), item[0][2:])))


def thinned(runs: list[Curve]) -> list[Curve]:
    """At most `MOST` of them, of all lengths: more tell a law little and cost time."""
    ordered = sorted(runs, key=lambda curve: (curve.rates.total, curve.path))
    return [ordered[at] for at in np.unique(np.linspace(0, len(ordered) - 1, MOST).round().astype(int))]


def crossed(law: str, train: list[Curve], test: list[Curve]) -> dict[str, Any] | None:
    """A fit on one kind of schedule, measured on the other; None where one run is all there is to fit."""
    if len(train) < 2 or sum(len(curve.loss) for curve in train) <= 2 * len(LAWS[law].order):
        return None
    begin = time.process_time()
    found = fit(LAWS[law](), train, profile=law == "annealing")
    seconds = time.process_time() - begin
    entries = []
    for curve in test:
        predicted = found.law.predict(curve.rates, curve.index, found.params, curve.size)
        entries.append(measures(curve.loss, predicted) | {"end": abs(float(predicted[-1] - curve.loss[-1]))})
    return {"seconds": seconds} | {key: float(np.mean([entry[key] for entry in entries])) for key in entries[0]}


def second_set(folder: Path) -> dict[str, Any]:
    """For each model: cosine runs predict WSD runs, and the reverse. Prints the table of docs/laws.md."""
    result: dict[str, Any] = {}
    columns = [f"`{law}` {way}" for way in WAYS for law in CROSSED]
    print("| " + " | ".join(["data, size", "peak", "runs", *columns, "CPU"]) + " |")
    print("|---" * (len(columns) + 4) + "|", flush=True)
    for (data, size, cos, wsd), runs in second_groups(folder).items():
        peaks = f"{float(cos):g}" if cos == wsd else f"{float(cos):g}, {float(wsd):g}"
        cells, seconds = [f"{data}, {int(size) / 1e6:.0f}M", peaks, f"{len(runs['cos'])}, {len(runs['wsd'])}"], 0.0
        for way, (train, test) in WAYS.items():
            for law in CROSSED:
                entry = crossed(law, runs[train], runs[test])
                result[f"{cells[0]} peak {peaks}: {law}, {way}"] = entry
                cells.append("" if entry is None else f"{entry['mae']:.4f}, {entry['end']:.4f}")
                seconds += 0.0 if entry is None else entry["seconds"]
        print("| " + " | ".join([*cells, f"{seconds:.1f} s"]) + " |", flush=True)
    return result


def show(label: str, entry: dict[str, Any]) -> None:
    """A line of the table."""
    if "mae" not in entry:
        print(f"  {label}: " + ", ".join(f"{prior} {mae:.5f}" for prior, mae in entry.items()), flush=True)
        return
    seconds = f"  {entry['seconds']:.1f} s" if "seconds" in entry else ""
    shares = f"mean {entry['mean_relative_error']:.3%}  worst {entry['worst_relative_error']:.3%}"
    print(f"  {label:<72} MAE {entry['mae']:.5f}  {shares}  R2 {entry['r2']:.4f}{seconds}", flush=True)


def main() -> None:
    """Print a line for each fit; write everything as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--only", choices=("mpl", "schaipp2025"), help="one of the data sets")
    arguments = parser.parse_args()
    result = {}
    for folder in sorted(arguments.curves.glob("mpl/csv_*")) if arguments.only != "schaipp2025" else []:
        print(folder.name, flush=True)
        result[folder.name] = first_set(folder)
        for label, entry in result[folder.name].items():
            show(label, entry)
    if (arguments.curves / "schaipp2025").is_dir() and arguments.only != "mpl":
        result["schaipp2025"] = second_set(arguments.curves / "schaipp2025")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
