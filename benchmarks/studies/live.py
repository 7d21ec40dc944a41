"""How near a run's own prediction of its end is, on six small runs of six schedules.

    python -m benchmarks.studies.live --data STORE --out DIR [--jobs 2] [--smoke]

A model of 0.1M parameters without embeddings, 4800 steps of 1024 tokens: long for its size, so that the beginning
(which follows no power law) is a small part. Prints, in Markdown, the error of the prediction after a quarter, half
and three quarters of each run. Stopped, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.studies.laws_report import live_table
from benchmarks.studies.runner import Point, run_points, study_parser

STEPS, SMOKE = 4800, 80
MODEL = (
    "model=llama_9m",
    "model.hidden_size=64",
    "model.intermediate_size=172",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "data.sequence_length=128",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "optim.lr=4e-3",
)
SCHEDULES = {
    "cosine": ("schedule=cosine", "schedule.min_lr_ratio=0.1"),
    "cosine to 0": ("schedule=cosine", "schedule.min_lr_ratio=0"),
    "linear": ("schedule=linear", "schedule.min_lr_ratio=0.05"),
    "constant": ("schedule=constant",),
    "wsd": ("schedule=wsd", "schedule.min_lr_ratio=0", "schedule.decay_fraction=0.2"),
    "wsd, sqrt": (
        "schedule=wsd",
        "schedule.min_lr_ratio=0",
        "schedule.decay_fraction=0.1",
        "schedule.decay_shape=sqrt",
    ),
}


def points(store: str, vocab_size: int, steps: int, seeds: tuple[int, ...]) -> Iterator[Point]:
    """The runs, those of a seed together."""
    sized = (
        f"train.steps={steps}",
        f"schedule.warmup_steps={steps // 40}",
        f"eval.every={steps // 80}",
        "eval.batches=16",
        f"log.every={steps // 80}",
        f"log.predict_every={steps // 20}",
        f"log.predict_loss=val/{Path(store).name}/loss",
        f"checkpoint.every={steps // 8}",
        "checkpoint.keep_last=1",
        f"model.vocab_size={vocab_size}",
        f"data.source={store}",
    )
    for seed in seeds:
        for name, schedule in SCHEDULES.items():
            named = name.replace(" ", "_").replace(",", "")
            yield Point(f"{named}_seed{seed}", (*MODEL, *sized, *schedule, f"train.seed={seed}"))


def main() -> None:
    """Train and print the table."""
    parser = study_parser(__doc__, 2048, (0,))
    parser.add_argument("--data", type=Path, required=True, help="packed store")
    arguments = parser.parse_args()
    steps, folder = (SMOKE if arguments.smoke else STEPS), arguments.out.resolve()
    seeds = tuple(arguments.seeds)
    found = list(points(str(arguments.data.resolve()), arguments.vocab_size, steps, seeds))
    run_points(found, folder, arguments.jobs)
    runs = {
        name: {seed: folder / "runs" / found[number + len(SCHEDULES) * place].name for place, seed in enumerate(seeds)}
        for number, name in enumerate(SCHEDULES)
    }
    print("\n".join(live_table(runs)))


if __name__ == "__main__":
    main()
