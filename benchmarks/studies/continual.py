"""Continual pre-training on two stores: how much replay keeps the old data, and what it costs on the new.

    python -m benchmarks.studies.continual --old STORE --new STORE --out DIR [--jobs 2] [--smoke]

Both stores must have been prepared with one tokenizer. Stopped, the same command goes on. A trunk is trained on the old
store with a cosine; it then goes on with the new one, warmed up and decayed again, with a reset optimizer and
0, 1, 5, 25, 50 % of every batch replayed from the trunk's data (Ibrahim et al. 2024, arXiv 2403.08763). Beside it the
baselines of that paper, and an infinite schedule. Every continuation has as many steps as the trunk. The model has 6
blocks of width 128 (1.2M parameters without embeddings). What differs between runs is in `variants` and nowhere else.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.studies.runner import Point, run_points, study_parser

REPLAY = (0.0, 0.01, 0.05, 0.25, 0.5)
SEEDS = (0, 1)
STEPS = 800
PEAK = 4e-3
FLOOR = 0.1
CONSTANT = 0.55
"""Constant learning rate of the infinite schedule over the peak: 1.65e-4 of 3e-4 in the paper."""
COMMON = (
    "model=llama_9m",
    "model.hidden_size=128",
    "model.intermediate_size=344",
    "model.num_hidden_layers=6",
    "model.num_attention_heads=4",
    "data.sequence_length=128",
    "train.global_batch_size=16",
    "train.micro_batch_size=16",
    f"optim.lr={PEAK}",
    f"schedule.min_lr_ratio={FLOOR}",
    "checkpoint.every=400",
    "checkpoint.keep_last=1",
    "eval.every=100",
    "eval.batches=64",
    "log.every=5",
)
SMOKE = ("eval.batches=1", "eval.every=4", "checkpoint.every=4")
COSINE = ("schedule=cosine",)
RESET = ("resume.mode=new_schedule", "resume.reset_optimizer=true")


def variants(old: str, new: str, runs: Path, seed: int, steps: int = STEPS) -> list[dict[str, tuple[str, ...]]]:
    """Overrides of the runs of a seed by name, in two parts: the second ones start from the first ones' ends."""
    warm = f"schedule.warmup_steps={max(1, steps // 100)}"  # 1 % of the steps, as in the paper
    sized = (f"train.steps={steps}", warm)
    both = f"data.source=[{{path: {old}, weight: 1}}, {{path: {new}, weight: 1}}]"
    trunk, infinite = runs / f"trunk_seed{seed}", runs / f"infinite_trunk_seed{seed}"
    # constant rate without end: what the trunk of an infinite schedule is before its annealing
    cooling = ("schedule=infinite", f"schedule.constant_lr_ratio={CONSTANT}", "schedule.decay_fraction=0")
    annealing = ("schedule=wsd", "schedule.decay_shape=exponential", "schedule.decay_fraction=0.2")

    def replaying(share: float, run: Path) -> tuple[str, ...]:
        return (f"data.source={new}", f"data.replay_from={run}", f"data.replay={share:g}", f"resume.path={run}")

    first = {
        "trunk": (f"data.source={old}", *sized, *COSINE),
        "infinite_trunk": (f"data.source={old}", *sized, *cooling),
        "new_only": (f"data.source={new}", *sized, *COSINE),
        "union": (both, f"train.steps={2 * steps}", f"schedule.warmup_steps={max(1, steps // 50)}", *COSINE),
    }
    second = {f"replay_{share * 100:g}": (*sized, *COSINE, *RESET, *replaying(share, trunk)) for share in REPLAY} | {
        "no_rewarm": (*sized, "schedule=constant", f"optim.lr={PEAK * FLOOR}", *RESET, *replaying(0.0, trunk)),
        "same_data": (f"data.source={old}", *sized, *COSINE, *RESET, f"resume.path={trunk}"),
        "infinite_5": (
            f"train.steps={steps}",
            *annealing,
            f"optim.lr={PEAK * CONSTANT}",
            f"schedule.min_lr_ratio={FLOOR / CONSTANT}",
            "resume.mode=new_schedule",
            *replaying(0.05, infinite),
        ),
    }
    return [first, second]


def points(
    old: str, new: str, vocab_size: int, runs: Path, smoke: bool = False, seeds: tuple[int, ...] = SEEDS
) -> list[list[Point]]:
    """Lists of runs; a list may start when the one before it has ended."""
    # COMMON's floor goes before what a variant says
    common = (*COMMON, f"model.vocab_size={vocab_size}", f"eval.sources=[{old},{new}]", *(SMOKE if smoke else ()))
    return [
        [Point(f"{name}_seed{seed}", (*common, f"train.seed={seed}", *own)) for name, own in part.items()]
        for seed in seeds
        for part in variants(old, new, runs, seed, 8 if smoke else STEPS)
    ]


def main() -> None:
    """Run the study; benchmarks.studies.continual_report makes its tables and figure."""
    parser = study_parser(__doc__, 4096, SEEDS)
    parser.add_argument("--old", required=True, type=Path, help="packed store that the trunk is trained on")
    parser.add_argument("--new", required=True, type=Path, help="packed store to go on with")
    arguments = parser.parse_args()
    old, new, out = (str(path.resolve()) for path in (arguments.old, arguments.new, arguments.out))
    seeds = tuple(arguments.seeds)
    for part in points(old, new, arguments.vocab_size, Path(out) / "runs", arguments.smoke, seeds):
        run_points(part, Path(out), arguments.jobs)


if __name__ == "__main__":
    main()
