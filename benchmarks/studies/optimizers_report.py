"""Page and figure of the optimizer study, from its folder.

    python -m benchmarks.studies.optimizers_report STUDY --figures docs/images > docs/reports/optimizers.md

Prints the whole page in Markdown. Every number comes from the study's folder, and so does what is said of it; a run
that has not ended is left out and its method's row says how many seeds there are.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import log, prod
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.studies.optimizers import BASELINES, METHODS, RATIO, at_edge, best_rate, grid, mean, name_of
from benchmarks.studies.runner import finish, metrics, report_arguments, spread, the_loss
from nexa.config import compose
from nexa.interop.weights import parameter_shapes
from nexa.optim.methods import keys_of, part_of, serve
from nexa.scaling.states import state_bytes

TITLES = {
    "adamw": "AdamW",
    "adamw_slow": "AdamW (beta2 0.999)",
    "adamw_free": "AdamW (no decay)",
    "adamw_slow_free": "AdamW (beta2 0.999, no decay)",
    "adamw_outside": "AdamW (4 x the rate outside matrices)",
    **{name: name for name in METHODS if name not in BASELINES},
}
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Search:
    """What was tried of a contestant. losses: rate -> seed -> final validation loss, None where the run diverged.
    best: rate with the lowest mean over all of `seeds`, None when there is none."""

    losses: dict[float, dict[int, float | None]]
    best: float | None

    @property
    def at_best(self) -> dict[int, float]:
        """Losses at the best rate, by seed."""
        found = {} if self.best is None else self.losses[self.best]
        return {seed: loss for seed, loss in found.items() if loss is not None}

    @property
    def edge(self) -> bool:
        """Whether nothing on one side of the best rate was tried."""
        return at_edge(list(self.losses), self.best)


def read_results(study: Path) -> dict[str, Any]:
    """What every finished run ended with, by name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted((study / "results").glob("*.json"))}


def searches(results: Results) -> dict[str, Search]:
    """By contestant, in the study's order, those of which any run has ended."""
    tried: dict[str, dict[float, dict[int, float | None]]] = {name: {} for name in METHODS}
    for name, result in results.items():
        rest, _, seed = name.rpartition("_seed")
        variant, _, rate = rest.rpartition("_lr")
        tried[variant].setdefault(float(rate), {})[int(seed)] = the_loss(result)
    found = {}
    for name, losses in tried.items():
        seeds = sorted({seed for runs in losses.values() for seed in runs})
        complete = [rate for rate, runs in losses.items() if len(runs) == len(seeds)]
        if losses:
            found[name] = Search(dict(sorted(losses.items())), best_rate(results, name, complete, seeds))
    return found


def tuned(found: Mapping[str, Search]) -> str | None:
    """The AdamW with the lowest mean loss at its best rate."""
    means = {name: statistics.mean(found[name].at_best.values()) for name in BASELINES if _has(found, name)}
    return min(means, key=lambda name: means[name], default=None)


def _has(found: Mapping[str, Search], name: str) -> bool:
    return name in found and bool(found[name].at_best)


def verdict(mine: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """`lower` or `higher` when no seed of the one is among those of the other, otherwise `within the seeds`, which one
    seed alone always is."""
    if len(mine) < 2 or len(theirs) < 2:
        return "within the seeds"
    if max(mine.values()) < min(theirs.values()):
        return "lower"
    return "higher" if min(mine.values()) > max(theirs.values()) else "within the seeds"


@functools.lru_cache
def bytes_of_state(overrides: tuple[str, ...]) -> float:
    """Of the optimizer of a run, for each parameter of its model."""
    cfg = compose([*overrides])
    served = serve(cfg.optim.name, keys_of(cfg))
    shapes = parameter_shapes(cfg.model, cfg.norm)
    return sum(state_bytes(served[part_of(name)].rule, shape) for name, shape in shapes.items()) / sum(
        map(prod, shapes.values())
    )


def step_seconds(study: Path, variant: str, search: Search) -> float | None:
    """The fastest tenth of the logged steps of all runs begins here: most others say what else ran at the time."""
    names = [name_of(variant, rate, seed) for rate, runs in search.losses.items() for seed in runs]
    found = [row["step_seconds"] for name in names for row in metrics(study / "runs" / name) if "step_seconds" in row]
    return statistics.quantiles(found, n=10)[0] if len(found) > 1 else None


def main_table(found: Mapping[str, Search], results: Results, study: Path) -> Iterator[str]:
    """Every contestant at its best rate against the best AdamW."""
    base = tuned(found)
    yield "| method | best rate | seeds | loss | against tuned AdamW | beyond the seeds? | state, bytes | ms a step |"
    yield "|---" * 8 + "|"
    for name in METHODS:
        if not _has(found, name):
            yield f"| {TITLES[name]} | {'all diverged' if name in found else 'not run'} | | | | | | |"
            continue
        search = found[name]
        assert search.best is not None and base is not None
        mine, theirs = search.at_best, found[base].at_best
        both = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
        against = spread(both, "+.3f") if both else ""
        overrides = results[name_of(name, search.best, min(mine))]["overrides"]
        seconds = step_seconds(study, name, search)
        cells = [
            TITLES[name] + (", the tuned one" if name == base else ""),
            f"{search.best:g}" + (" (edge)" if search.edge else ""),
            str(len(mine)),
            spread(list(mine.values())),
            *(("–", "–") if name == base else (against, verdict(mine, theirs))),
            f"{bytes_of_state(tuple(overrides)):.2f}",
            "–" if seconds is None else f"{1e3 * seconds:.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def rate_table(found: Mapping[str, Search]) -> Iterator[str]:
    """Loss at every rate; columns are multiples of the centre of each method's grid."""
    powers = sorted({_power(name, rate) for name, search in found.items() for rate in search.losses})
    shown = [f"÷ {RATIO**-power:g}" if power < 0 else f"× {RATIO**power:g}" for power in powers]
    yield f"| method | centre | {' | '.join('centre' if not p else s for p, s in zip(powers, shown, strict=True))} |"
    yield "|---" * (len(powers) + 2) + "|"
    for name, search in found.items():
        cells = {_power(name, rate): _cell(list(runs.values())) for rate, runs in search.losses.items()}
        row = " | ".join(cells.get(power, "") for power in powers)
        yield f"| {TITLES[name]} | {METHODS[name].centre:g} | {row} |"


def _power(name: str, rate: float) -> int:
    return round(log(rate / METHODS[name].centre) / log(RATIO))


def _cell(values: list[float | None]) -> str:
    ended = [value for value in values if value is not None]
    if len(ended) < len(values):
        return f"{len(values) - len(ended)} of {len(values)} diverged"
    return spread(ended)


def draw(found: Mapping[str, Search], path: Path) -> None:
    """Left: loss against the rate over the best one. Right: best loss of each seed against the tuned AdamW's."""
    base = tuned(found)
    assert base is not None, "no AdamW has ended"
    figure = Figure(figsize=(13, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    shown = [name for name in METHODS if _has(found, name)]
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for number, name in enumerate(shown):
        search, colour = found[name], colours[number % 20]
        assert search.best is not None
        means = {rate / search.best: mean(runs.values()) for rate, runs in search.losses.items()}
        means = {off: value for off, value in means.items() if value is not None}
        line = "--" if name in BASELINES else "-"
        left.plot([*means], [*means.values()], line, marker=".", color=colour, lw=1.2, label=TITLES[name])
        theirs = found[base].at_best
        gaps = [loss - theirs[seed] for seed, loss in search.at_best.items() if seed in theirs]
        right.plot(gaps, [len(shown) - number] * len(gaps), "o", color=colour)
    left.set(xlabel="rate over the method's best", ylabel="validation loss, nats a token", xscale="log")
    left.set_xlim(right=left.get_xlim()[1] * 15)  # room for the legend
    right.set(xlabel=f"best loss against {TITLES[base]}'s (one point a seed)")
    finish(figure, [TITLES[name] for name in shown], path)


def findings(found: Mapping[str, Search]) -> Iterator[str]:
    """What the numbers say, in sentences."""
    base = tuned(found)
    assert base is not None, "no AdamW has ended"
    theirs = found[base].at_best
    said: dict[str, list[str]] = {"lower": [], "within the seeds": [], "higher": []}
    for name in METHODS:
        if name not in BASELINES and _has(found, name):
            said[verdict(found[name].at_best, theirs)].append(name)
    plain = found["adamw"].at_best if _has(found, "adamw") else None
    words = {
        "lower": "Below the tuned AdamW with every seed",
        "within the seeds": "Not to be told from it by these seeds",
        "higher": "Above it with every seed",
    }
    for kind, names in said.items():
        yield f"- **{words[kind]}**: {', '.join(names) or 'none'}."
    if plain is not None and found["adamw"].best is not None:
        spans = {
            name: max(means) - min(means)
            for name in METHODS
            if _has(found, name) and len(means := _means_of_neighbours(found[name])) > 1
        }
        if spans:
            widest, least = max(spans, key=lambda n: spans[n]), min(spans, key=lambda n: spans[n])
            yield (
                f"- **A factor of {RATIO:g} in the rate costs** {spans[least]:.3f} ({TITLES[least]}) to "
                f"{spans[widest]:.3f} ({TITLES[widest]}) nats beside the best rate. A comparison at a rate that was "
                "searched for one side only can have any result within that."
            )
    edges = [TITLES[name] for name in METHODS if name in found and found[name].edge]
    yield (
        f"- **Best rate at the edge of what was tried**: {', '.join(edges)}; these may be better than they look."
        if edges
        else "- **No best rate is at the edge** of what was tried."
    )


def _means_of_neighbours(search: Search) -> list[float]:
    """Mean losses at the best rate and at those next to it, of those at which no seed diverged."""
    rates = list(search.losses)
    if search.best is None:
        return []
    at = rates.index(search.best)
    means = [mean(search.losses[rate].values()) for rate in rates[max(0, at - 1) : at + 2]]
    return [value for value in means if value is not None]


PAGE = """# Optimizers at equal tokens

Methods of [optimizers](../optimizers.md) against AdamW on real text, each at its own best rate: at a size that a CPU
can repeat. Every run is reported.

```bash
python -m benchmarks.studies.optimizers --data en_docs.jsonl.gz --out studies/optimizers --jobs 2
python -m benchmarks.studies.optimizers_report studies/optimizers --figures docs/images
```

Stopped, the first command goes on. The second prints this page. {about}

## Setting

A BPE of {vocab:,} tokens, {blocks} blocks of width {width} ({parameters:.2f}M parameters), {steps} steps of {batch:,}
tokens, fp32. Initial weights, order of the data, warm-up ({warmup} steps), cosine to a tenth, clipping at {clip:g} and
evaluation are those of the seed, whatever the method. A method has its file in `conf/optim`, decay included; AdamW is
tried with two sets of betas, with and without decay, and with 4 times the rate outside matrices (GaLore and Conda
multiply the updates of matrices by 1/4 and leave the rest to AdamW: what that alone does is no merit of theirs).
Periods that are meant for long runs are shorter (Conda's basis every 100 steps, resets of SPAM and Stable-SPAM every
200), ranks are a quarter of the width.

Rates are a factor of {ratio:g} apart: {grid} for each method, and up to two more where the best is the first or the
last of them. The rate is that of all parameters, but for the factor that some files have for what AdamW serves
(`rest_lr_ratio`). Loss: of validation, nats a token, after the last step; mean of seeds ± half of what lies between the
smallest and the largest; differences are taken seed by seed. "Beyond the seeds": no seed of the one is among those of
the other. State: bytes for each parameter of this whole model, embedding and head included, which most methods leave to
AdamW. Milliseconds are a whole training step's on one core, where the fastest tenth of all that were logged beside
other runs begins; at this size most of it is overhead. [Benchmarks](../benchmarks.md#what-an-optimizer-costs) have
what an optimizer costs.

## Result

{main}

![loss by rate, and best losses against AdamW](../images/optimizers.png)

Loss at every rate:

{rates}

## What this says

{findings}

## What this cannot say

- A factor of {ratio:g} is a coarse grid, and the lowest of a few is partly luck; AdamW has five times as many tries as
  the others. Differences as small as those of seeds say nothing, and {seeds} seeds say little of seeds.
- {tokens:.1f} tokens for each parameter in {steps} steps: what a method does early. Resets, bases and averages that pay
  over ten thousand steps have little time, and their shortened periods are a guess.
- The rarest events, such as the spikes that SPAM is made for, hardly come in runs this short with clipping.
- At a width of {width} a low rank is {rank}; embedding and head are {share:.0%} of the parameters, and most methods
  leave them to AdamW. Memory, for which many of these methods are made, is no question at this size.
- Only AdamW was tried with another rate outside matrices, once. SPAM, Stable-SPAM and the others may gain by it as
  well, and AdamW by more than one try.
- One corpus, one schedule, one batch size, fp32. Published comparisons are at 60M to 7B parameters.
"""


def page(found: Mapping[str, Search], results: Results, study: Path) -> str:
    """The whole report."""
    first = next(iter(results.values()))["overrides"]
    cfg = compose(first)
    shapes = parameter_shapes(cfg.model, cfg.norm)
    counts = {name: prod(shape) for name, shape in shapes.items()}
    total, steps, batch = sum(counts.values()), cfg.total_steps, cfg.train.global_batch_size * cfg.data.sequence_length
    outside = sum(count for name, count in counts.items() if part_of(name) in ("embed", "head"))
    hours = sum(result["seconds"] for result in results.values()) / 3600
    return PAGE.format(
        about=f"{len(results)} runs, {hours:.1f} hours of run time in all.",
        vocab=cfg.model.vocab_size,
        blocks=cfg.model.num_hidden_layers,
        width=cfg.model.hidden_size,
        parameters=total / 1e6,
        steps=steps,
        batch=batch,
        warmup=cfg.schedule.warmup_steps,
        clip=cfg.train.grad_clip,
        ratio=RATIO,
        grid=len(grid(1.0)),
        main="\n".join(main_table(found, results, study)),
        rates="\n".join(rate_table(found)),
        findings="\n".join(findings(found)),
        tokens=steps * batch / total,
        rank=cfg.model.hidden_size // 4,
        share=outside / total,
        seeds=max(len(search.at_best) for search in found.values()),
    )


def main() -> None:
    """Print the page and draw the figure."""
    arguments = report_arguments(__doc__)
    results = read_results(arguments.study)
    found = searches(results)
    draw(found, arguments.figures / "optimizers.png")
    print(page(found, results, arguments.study), end="")


if __name__ == "__main__":
    main()
