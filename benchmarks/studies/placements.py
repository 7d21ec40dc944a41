"""Placements of norms compared on real text: every variant at every learning rate and seed, at equal tokens.

    python -m benchmarks.studies.placements --data STORE --out DIR [--jobs 2] [--smoke]

Stopped, the same command goes on. 16 blocks of width 96 (1.8M parameters without embeddings), 300 steps of 2,048
tokens, AdamW with decay 0.1, clipping at 1, cosine to a tenth after 30 steps of warm-up. What differs between
variants is in `VARIANTS` and nowhere else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.studies.runner import Point, run_points, the_loss

VARIANTS: dict[str, tuple[str, ...]] = {
    "pre": ("norm=pre",),
    "lns": ("norm=lns",),
    "post": ("norm=post",),
    "mix": ("norm=mix",),
    "peri": ("norm=peri", "norm.embedding=true"),
    "deepnorm": ("norm=deepnorm", "model.initializer=xavier"),
    "pre_scaled": ("norm=pre", "model.initializer=scaled"),
}
"""Name -> what makes it. Each has its paper's own initialisation where the method needs it (DeepNorm's is part of
it); `pre_scaled` is the baseline that most papers leave out: output matrices divided by sqrt(2L)."""
LEARNING_RATES = (2e-3, 6e-3)
SEEDS = (0, 1)
COMMON = (
    "model=llama_9m",
    "model.hidden_size=96",
    "model.intermediate_size=256",
    "model.num_hidden_layers=16",
    "model.num_attention_heads=4",
    "data.sequence_length=128",
    "train.steps=300",
    "train.global_batch_size=16",
    "train.micro_batch_size=16",
    "schedule=cosine",
    "schedule.warmup_steps=30",
    "schedule.min_lr_ratio=0.1",
    "checkpoint.every=150",
    "checkpoint.keep_last=1",
    "eval.every=100",
    "eval.batches=32",
    "log.every=5",
    "log.norms_every=10",
)
SMOKE = ("train.steps=6", "schedule.warmup_steps=2", "model.num_hidden_layers=2", "eval.batches=1")


def points(data: str, vocab_size: int, smoke: bool = False) -> list[Point]:
    """All runs, seed by seed, so that a study that was stopped has compared all variants on the first seeds."""
    source = (f"data.source={data}", f"model.vocab_size={vocab_size}")
    return [
        Point(
            f"{variant}_lr{lr:g}_seed{seed}",
            (*COMMON, *source, *overrides, f"optim.lr={lr:g}", f"train.seed={seed}", *(SMOKE if smoke else ())),
        )
        for seed in SEEDS
        for lr in LEARNING_RATES
        for variant, overrides in VARIANTS.items()
    ]


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="embedded", help="packed store, or `embedded` (default)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens of the store's tokenizer (default 2048)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread (default 1)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a small model: does everything work?")
    arguments = parser.parse_args()
    results = run_points(points(arguments.data, arguments.vocab_size, arguments.smoke), arguments.out, arguments.jobs)
    for name, result in results.items():
        loss = the_loss(result)
        print(f"{name:28} {'diverged' if loss is None else format(loss, '.4f')}")


if __name__ == "__main__":
    main()
