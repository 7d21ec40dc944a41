"""Tables and figure of the study of laws, from its folder.

    python -m benchmarks.studies.laws_report STUDY --figures docs/images

Prints the tables in Markdown. What was not run is left out and counted. Losses are those of validation.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.studies.laws import CHOOSER, FITTED, PREDICTORS, SEEDS, TESTED
from benchmarks.studies.runner import metrics, report_arguments, spread
from nexa.scaling.laws import LAWS
from nexa.scaling.laws.curves import load
from nexa.scaling.laws.figures import draw
from nexa.scaling.laws.files import Fitted
from nexa.scaling.laws.fit import score
from nexa.scaling.laws.live import Live

SCHEDULES = (*FITTED, *TESTED, "chosen")
HALF = 0.5
Runs = dict[str, dict[int, Path]]


def ended(study: Path) -> Runs:
    """Folders of the runs that have ended, by schedule and seed."""
    found: Runs = {}
    for schedule in SCHEDULES:
        for seed in SEEDS:
            if (study / "results" / f"{schedule}_seed{seed}.json").exists():
                found.setdefault(schedule, {})[seed] = study / "runs" / f"{schedule}_seed{seed}"
    return found


def loss_key(run: Path) -> str:
    """Key of the validation loss of a run."""
    (key,) = {key for row in metrics(run) for key in row if key.startswith("val/") and key.endswith("/loss")}
    return key


def final(run: Path) -> float:
    """The last validation loss."""
    key = loss_key(run)
    return float(next(row[key] for row in reversed(metrics(run)) if key in row))


def of_predictions(predictions: dict[str, Any], law: str) -> Fitted:
    """The law that was fitted before the tested schedules were run."""
    params = predictions["params"][law]
    made = LAWS[law]()
    return Fitted(made.with_fixed(**{name: params[name] for name in made.fixed}), params)


def prediction_table(runs: Runs, predictions: dict[str, Any]) -> Iterator[str]:
    """Every schedule: final loss over seeds, what each law said, and its mean error over all rows."""
    laws = {name: of_predictions(predictions, name) for name in PREDICTORS}
    columns = [f"`{name}`: final | error | mean error of all rows" for name in PREDICTORS]
    yield f"| schedule | | seeds | final loss | {' | '.join(columns)} |"
    yield "|---" * (4 + 3 * len(PREDICTORS)) + "|"
    for schedule in SCHEDULES:
        found = runs.get(schedule, {})
        how = "fitted" if schedule in FITTED else "predicted"
        if not found:
            yield f"| {schedule} | {how} | 0 | not run |" + " |" * 3 * len(PREDICTORS)
            continue
        ends = [final(run) for run in found.values()]
        cells = []
        for name, law in laws.items():
            said = predictions["final"][name][schedule]
            rows = [score(law.law, law.params, c) for run in found.values() for c in load([run], loss_key(run))]
            off = statistics.mean(row["mean_relative_error"] for row in rows)
            cells += [f"{said:.4f}", f"{said / statistics.mean(ends) - 1:+.2%}", f"{off:.2%}"]
        yield f"| {schedule} | {how} | {len(found)} | {spread(ends, '.4f')} | {' | '.join(cells)} |"


def choice_table(runs: Runs) -> Iterator[str]:
    """The chosen schedule against each other one, seed by seed."""
    yield "| chosen against | seeds | difference of final losses | by seed |"
    yield "|---|---|---|---|"
    mine = {seed: final(run) for seed, run in runs.get("chosen", {}).items()}
    for schedule in (*FITTED, *TESTED):
        pairs = [mine[seed] - final(run) for seed, run in runs.get(schedule, {}).items() if seed in mine]
        shown = f"{spread(pairs, '+.4f')} | {', '.join(f'{one:+.4f}' for one in pairs)}" if pairs else "not run | "
        yield f"| {schedule} | {len(pairs)} | {shown} |"


def live(run: Path, share: float = HALF) -> tuple[float, bool] | None:
    """Relative error of the prediction after that share of the run, and whether the interval had the end.

    Made from the run's rows as its hook makes it, by the law as it is now.
    """
    (curve,) = load([run], loss_key(run))
    law = Live(curve.rates)
    for index, loss in zip(curve.index, curve.loss, strict=True):
        if index < share * curve.rates.total:
            law.add(int(index), float(loss))
    said, end = law.forecast(), final(run)
    return None if said is None else (said.final / end - 1, said.low <= end <= said.high)


def live_table(runs: Runs) -> Iterator[str]:
    """Errors of predictions made while a run goes on, and the median of all."""
    yield "| schedule | after 25 % | 50 % | 75 % | inside the interval after 50 % |"
    yield "|---|---|---|---|---|"
    shares = (0.25, HALF, 0.75)
    everything: dict[float, list[float]] = {share: [] for share in shares}
    for schedule, found in runs.items():
        cells = []
        for share in shares:
            errors = [one[0] for run in found.values() if (one := live(run, share)) is not None]
            everything[share] += errors
            cells.append(", ".join(f"{error:+.2%}" for error in errors) or "–")
        inside = [one[1] for run in found.values() if (one := live(run)) is not None]
        yield f"| {schedule} | {' | '.join(cells)} | {sum(inside)} of {len(inside)} |"
    medians = [statistics.median(map(abs, errors)) if errors else float("nan") for errors in everything.values()]
    yield f"| median of all | {' | '.join(f'{one:.2%}' for one in medians)} | |"


def main() -> None:
    """Print the tables and draw the figure: one seed of each schedule with the law that chose."""
    arguments = report_arguments(__doc__)
    predictions = json.loads((arguments.study / "predictions.json").read_text())
    runs = ended(arguments.study)
    for table in (prediction_table(runs, predictions), choice_table(runs), live_table(runs)):
        print("\n".join(table), end="\n\n")
    first = [next(iter(found.values())) for found in runs.values()]
    curves = load(first, loss_key(first[0]))
    draw(arguments.figures / "laws_own_runs.svg", of_predictions(predictions, CHOOSER), curves)


if __name__ == "__main__":
    main()
