"""Laws put to the test on runs of our own: predict a schedule before it is run, choose the best one, run it.

    python -m benchmarks.studies.laws --data STORE --out DIR [--jobs 2] [--smoke]

First the schedules of `FITTED` are trained. The laws of `PREDICTORS`, fitted to them, predict those of `TESTED`;
one chooses a schedule. That goes into `predictions.json`, which is never written again; only then the tested and
the chosen schedule are trained. All runs have one peak rate, one lowest rate and one length, and predict their own end
as they go. benchmarks.studies.laws_report makes the tables and the figure. Stopped, the same command goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies.runner import Point, run_points, study_parser
from nexa.config.schema import ScheduleConfig
from nexa.scaling.laws import LAWS
from nexa.scaling.laws.curves import load
from nexa.scaling.laws.files import Fitted, of_fit, to_json, write
from nexa.scaling.laws.fit import fit
from nexa.scaling.laws.optimise import optimise, trainers_rates

SEEDS = (0, 1, 2)
PEAK, FLOOR = 4e-3, 0.02
FITTED, TESTED = ("cosine", "constant"), ("wsd",)
PREDICTORS = ("annealing", "multipower")
CHOOSER = "multipower"
MODEL = (
    "model=llama_9m",
    "model.intermediate_size=344",
    "data.sequence_length=128",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    f"optim.lr={PEAK}",
)


@dataclass(frozen=True)
class Size:
    """How long the runs of a study are, in steps; evaluations are so many steps apart and have so many batches."""

    steps: int
    warmup: int
    evaluate: int
    batches: int

    def overrides(self) -> tuple[str, ...]:
        """What all runs have."""
        return (
            f"train.steps={self.steps}",
            f"schedule.warmup_steps={self.warmup}",
            f"eval.every={self.evaluate}",
            f"eval.batches={self.batches}",
            f"log.predict_every={2 * self.evaluate}",
            "log.every=5",
            f"checkpoint.every={self.steps // 6}",
            "checkpoint.keep_last=1",
        )


WHOLE, SMOKE = Size(2400, 120, 50, 32), Size(120, 12, 4, 2)


def points(
    store: str, vocab_size: int, size: Size, seeds: tuple[int, ...], schedules: dict[str, tuple[str, ...]]
) -> list[Point]:
    """The runs of these schedules, those of a seed together."""
    source = Path(store).name
    common = (*MODEL, *size.overrides(), f"model.vocab_size={vocab_size}", f"data.source={store}")
    return [
        Point(
            f"{name}_seed{seed}",
            (*common, *schedule, f"log.predict_loss=val/{source}/loss", f"train.seed={seed}"),
        )
        for seed in seeds
        for name, schedule in schedules.items()
    ]


def usual(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Overrides of the schedules that have no points."""
    return {name: (f"schedule={name}", f"schedule.min_lr_ratio={FLOOR}") for name in names}


def chosen(predictions: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Overrides of the schedule that the law has chosen."""
    points = (f"schedule.{key}={predictions['chosen'][key]}" for key in ("point_steps", "point_ratios"))
    return {"chosen": ("schedule=piecewise", *points)}


def fitted(law: str, runs: list[Path], loss: str) -> Fitted:
    """A law with the settings of `nexa law fit`, on run folders."""
    curves = load(runs, loss)
    made = LAWS[law]()
    return of_fit(fit(made, curves, profile="lambda" in made.fixed), curves)


def predict(folder: Path, size: Size, source: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """What the laws say of schedules that have not been run; made once."""
    file = folder / "predictions.json"
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text())
        return known
    runs = [folder / "runs" / f"{name}_seed{seed}" for name in FITTED for seed in seeds]
    result: dict[str, Any] = {"params": {}, "final": {}}
    schedules = {
        name: ScheduleConfig(name, warmup_steps=size.warmup, min_lr_ratio=FLOOR)  # type: ignore[arg-type]
        for name in (*FITTED, *TESTED)
    }
    laws = {name: fitted(name, runs, f"val/{source}/loss") for name in PREDICTORS}
    best = optimise(laws[CHOOSER], size.steps, PEAK, size.warmup, FLOOR).schedule
    result["chosen"] = {"point_steps": best.point_steps, "point_ratios": best.point_ratios}
    for name, law in laws.items():
        result["params"][name] = law.params
        result["final"][name] = {
            kind: law.law.final(trainers_rates(schedule, size.steps, PEAK), law.params)[0]
            for kind, schedule in (schedules | {"chosen": best}).items()
        }
    write(file, to_json(result))
    return result


def main() -> None:
    """Run the study."""
    parser = study_parser(__doc__, 2048, SEEDS)
    parser.add_argument("--data", type=Path, required=True, help="packed store")
    arguments = parser.parse_args()
    size, seeds, folder = (SMOKE if arguments.smoke else WHOLE), tuple(arguments.seeds), arguments.out.resolve()
    store = str(arguments.data.resolve())

    def train(schedules: dict[str, tuple[str, ...]]) -> None:
        run_points(points(store, arguments.vocab_size, size, seeds, schedules), folder, arguments.jobs)

    train(usual(FITTED))
    predictions = predict(folder, size, Path(store).name, seeds)
    train(usual(TESTED) | chosen(predictions))


if __name__ == "__main__":
    main()
