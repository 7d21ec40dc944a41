"""Optimizers compared on real text: every method at every rate and seed, at equal tokens, each at its own best rate.

    python -m benchmarks.studies.optimizers --data STORE_OR_TEXT --out DIR [--jobs 2] [--smoke]

4 blocks of width 64 (0.33M parameters, 0.13M of them in embedding and head), 500 steps of 2,048 tokens. Initial
weights, order of the data, schedule, warm-up, clipping and number of steps are those of the seed for all; methods
differ in `METHODS` and nowhere else: their file in conf/optim, and what of it is counted in steps or in dimensions
and would have no meaning in a run and a model of this size. Rates are a factor of 3 apart around a centre. A method
whose best rate is the lowest or the highest gets the next one, EXTENSIONS times at most. AdamW is searched over betas
and decay, too. Text is made a packed store first. Stopped, the same command goes on.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies.runner import REPOSITORY, Point, run_points, spread, study_parser, the_loss
from data_pipeline.store import MANIFEST, open_store

RATIO = 3.0
"""Between neighbouring rates."""
EXTENSIONS = 2
"""Rates that a method may get beyond its grid."""
SEEDS = (0, 1)
COMMON = (
    "model=llama_9m",
    "model.hidden_size=64",
    "model.intermediate_size=176",
    "model.num_attention_heads=2",
    "model.num_hidden_layers=4",
    "data.sequence_length=128",
    "train.steps=500",
    "train.global_batch_size=16",
    "train.micro_batch_size=16",
    "train.grad_clip=1.0",
    "schedule=cosine",
    "schedule.warmup_steps=25",
    "schedule.min_lr_ratio=0.1",
    "checkpoint.every=250",
    "checkpoint.keep_last=1",
    "eval.every=250",
    "eval.batches=32",
    "log.every=5",
)
SMOKE = ("train.steps=4", "schedule.warmup_steps=1", "model.num_hidden_layers=1", "eval.every=4", "eval.batches=1")


@dataclass(frozen=True)
class Contestant:
    """A method with all its settings but the rate. centre: of its rates. overrides: beside `optim=NAME`."""

    method: str
    centre: float
    overrides: tuple[str, ...] = ()


OUTSIDE = ("optim.density=1", "optim.refresh_every=100000", "optim.betas=[0.9,0.95]", "optim.rest_lr_ratio=4")
"""FRUGAL that leaves nothing out and refreshes nothing is Adam on matrices, with another rate outside of them."""
METHODS: dict[str, Contestant] = {
    "adamw": Contestant("adamw", 4e-3),
    "adamw_slow": Contestant("adamw", 4e-3, ("optim.betas=[0.9,0.999]",)),
    "adamw_free": Contestant("adamw", 4e-3, ("optim.weight_decay=0",)),
    "adamw_slow_free": Contestant("adamw", 4e-3, ("optim.betas=[0.9,0.999]", "optim.weight_decay=0")),
    "adamw_outside": Contestant("frugal", 4e-3, OUTSIDE),
    "muon": Contestant("muon", 4e-3),
    "conda": Contestant("conda", 1e-2, ("optim.refresh_every=100",)),
    "stable_spam": Contestant("stable_spam", 4e-3, ("optim.reset_every=200",)),
    "spam": Contestant("spam", 4e-3, ("optim.reset_every=200", "optim.reset_warmup_steps=60")),
    "scale": Contestant("scale", 1e-3),
    "sinkgd": Contestant("sinkgd", 6e-2),
    "subset_norm": Contestant("subset_norm", 5e-2),
    "galore": Contestant("galore", 1e-2, ("optim.rank=16",)),
    "apollo": Contestant("apollo", 1e-2, ("optim.rank=16",)),
}
"""Name -> contestant. Conda refreshes five times, as often as published; SPAM and Stable-SPAM reset twice (else once,
at the end, or never); low-rank methods have the published quarter of the width. AdamW stands for itself four times:
with the betas of GPT-3 and with PyTorch's, with decay and, as most of the others are published, without; a fifth time
with four times the rate in embedding, head and vectors, because GaLore and Conda scale the updates of matrices by 1/4
and leave the rest to AdamW: what that alone does is no merit of theirs."""
BASELINES = tuple(name for name in METHODS if name.startswith("adamw"))


def name_of(variant: str, lr: float, seed: int) -> str:
    """The study's name of a run."""
    return f"{variant}_lr{lr:g}_seed{seed}"


def grid(centre: float) -> list[float]:
    """The rates that every method has."""
    return [float(f"{centre * RATIO**power:.2g}") for power in (-1, 0, 1)]


def points(
    store: str, vocab_size: int, rates: Mapping[str, Sequence[float]], seeds: Sequence[int], smoke: bool = False
) -> list[Point]:
    """The runs of these rates by contestant, seed by seed, so that a study that was stopped compares all of one."""
    common = (*COMMON, f"model.vocab_size={vocab_size}", f"data.source={store}", *(SMOKE if smoke else ()))
    return [
        Point(
            name_of(name, lr, seed),
            (f"optim={one.method}", *common, *one.overrides, f"optim.lr={lr:g}", f"train.seed={seed}"),
        )
        for seed in seeds
        for name, one in METHODS.items()
        for lr in rates[name]
    ]


def losses(results: Mapping[str, Any], variant: str, lr: float, seeds: Sequence[int]) -> list[float | None]:
    """Final validation losses of the seeds that have ended, None for those that diverged."""
    names = [name_of(variant, lr, seed) for seed in seeds]
    return [the_loss(results[name]) for name in names if name in results]


def mean(values: Iterable[float | None]) -> float | None:
    """Of the seeds; None where one diverged or none has ended."""
    found = list(values)
    ended = [value for value in found if value is not None]
    return statistics.mean(ended) if ended and len(ended) == len(found) else None


def best_rate(results: Mapping[str, Any], variant: str, rates: Sequence[float], seeds: Sequence[int]) -> float | None:
    """The rate with the lowest mean over seeds, of those at which none diverged; None when there is none."""
    means = {lr: mean(losses(results, variant, lr, seeds)) for lr in rates}
    found = {value: lr for lr, value in means.items() if value is not None}
    return found[min(found)] if found else None


def at_edge(rates: Sequence[float], best: float | None) -> bool:
    """Whether a better rate may lie outside; where all rates diverge it does."""
    return best in (None, min(rates), max(rates))


def next_rate(results: Mapping[str, Any], variant: str, rates: Sequence[float], seeds: Sequence[int]) -> float | None:
    """The rate to try beyond those that have run; None when the best one has worse neighbours, or after EXTENSIONS."""
    best = best_rate(results, variant, rates, seeds)
    if not at_edge(rates, best) or len(rates) >= len(grid(1.0)) + EXTENSIONS:
        return None
    beyond = max(rates) * RATIO if best == max(rates) else min(rates) / RATIO
    return float(f"{beyond:.2g}")


def search(
    store: str, vocab_size: int, folder: Path, jobs: int, seeds: Sequence[int], smoke: bool
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Run all grids, then what lies beyond them; results by name of the run, and rates in order by contestant."""
    rates = {name: [one.centre] if smoke else grid(one.centre) for name, one in METHODS.items()}
    while True:
        results = run_points(points(store, vocab_size, rates, seeds, smoke), folder, jobs)
        more = {name: next_rate(results, name, found, seeds) for name, found in rates.items()}
        if smoke or not any(more.values()):
            return results, rates
        for name, lr in more.items():
            if lr is not None:
                rates[name] = sorted([*rates[name], lr])


def packed(data: Path, folder: Path, vocab_size: int) -> Path:
    """The store itself, or one that is made of text once, with a BPE of `vocab_size` tokens trained on it."""
    if (data / MANIFEST).exists():
        return data.resolve()
    store = folder / "store"
    if not (store / MANIFEST).exists():
        options = ["--out", str(store), "--train-bpe", str(vocab_size), "--validation-fraction", "0.05"]
        command = [sys.executable, "-m", "nexa.cli.main", "data", "prepare", str(data.resolve()), *options]
        if subprocess.run(command, cwd=REPOSITORY).returncode:
            raise SystemExit(f"{data}: no store was made of it")
    return store


def main() -> None:
    """Run the study and print how each method ended; benchmarks.studies.optimizers_report makes table and figure."""
    parser = study_parser(__doc__, 1024, SEEDS)
    parser.add_argument(
        "--data", type=Path, required=True, help="packed store, or text as `nexa data prepare` takes it"
    )
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    store = packed(arguments.data, folder, arguments.vocab_size)
    vocab_size = open_store(str(store), "train").vocab_size
    assert vocab_size is not None, "a store of `nexa data prepare` knows its tokenizer"
    seeds = tuple(arguments.seeds)
    results, rates = search(str(store), vocab_size, folder, arguments.jobs, seeds, arguments.smoke)
    for name, found in rates.items():
        best = best_rate(results, name, found, seeds)
        if best is None:
            print(f"{name:14} diverged at all rates")
            continue
        values = [loss for loss in losses(results, name, best, seeds) if loss is not None]
        edge = ", the last rate that was tried" if at_edge(found, best) else ""
        print(f"{name:14} {spread(values)} at {best:g}{edge}")


if __name__ == "__main__":
    main()
