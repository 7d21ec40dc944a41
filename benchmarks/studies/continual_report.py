"""Tables and figure of the continual study, from its folder.

    python -m benchmarks.studies.continual_report STUDY --figures docs/images

Prints the tables in Markdown. What was not run is left out and counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.studies.continual import REPLAY, SEEDS
from benchmarks.studies.placements_report import Results, read_results
from benchmarks.studies.runner import metrics, report_arguments, spread

REPLAYED = {f"replay_{share * 100:g}": f"{share * 100:g} % replay" for share in REPLAY}
TITLES = REPLAYED | {
    "union": "union from scratch, twice the steps",
    "trunk": "old only (the trunk)",
    "new_only": "new only, from scratch",
    "no_rewarm": "0 %, not warmed up, rate at the floor",
    "same_data": "warmed up again on more of the old",
    "infinite_5": "5 %, infinite schedule",
}


def losses(results: Results, variant: str) -> list[tuple[float, float, float]]:
    """(old, new, their mean) at the end, for each seed that has ended."""
    ended = [results.get(f"{variant}_seed{seed}") for seed in SEEDS]
    pairs = [tuple(result["validation"].values()) for result in ended if result is not None and not result["diverged"]]
    assert all(len(pair) == 2 for pair in pairs), "the study validates on both stores"
    return [(old, new, (old + new) / 2) for old, new in pairs]


def table(results: Results) -> Iterator[str]:
    """Every variant: old, new, average; and the average against the union's."""
    yield "| run | seeds | old | new | average | average against union |"
    yield "|---" * 6 + "|"
    union = [average for _, _, average in losses(results, "union")]
    for variant, title in TITLES.items():
        found = losses(results, variant)
        if not found:
            yield f"| {title} | 0 | not run | | | |"
            continue
        cells = " | ".join(spread(list(column)) for column in zip(*found, strict=True))
        against = statistics.mean(average for *_, average in found) - statistics.mean(union) if union else float("nan")
        yield f"| {title} | {len(found)} | {cells} | {against:+.3f} |"


def _validation(rows: list[dict[str, Any]], number: int) -> tuple[list[float], list[float]]:
    """Tokens and the losses on the number-th validation source."""
    keys = [key for row in rows for key in row if key.startswith("val/") and key.endswith("/loss")]
    key = list(dict.fromkeys(keys))[number]
    return [row["tokens"] for row in rows if key in row], [row[key] for row in rows if key in row]


def draw(study: Path, results: Results, path: Path) -> None:
    """Left and middle: losses on old and new data while going on, first seed. Right: where they end, by replay."""
    figure = Figure(figsize=(15, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    seed = SEEDS[0]
    for number, (axes, what) in enumerate(((left, "old"), (middle, "new"))):
        for colour, (variant, title) in enumerate(REPLAYED.items()):
            if f"{variant}_seed{seed}" in results:
                tokens, values = _validation(metrics(study / "runs" / f"{variant}_seed{seed}"), number)
                axes.plot(tokens, values, ".-", color=f"C{colour}", lw=1, label=title)
        levels = (("--", "trunk"), (":", "union")) if what == "old" else (("--", "new_only"), (":", "union"))
        for line, variant in levels:
            if found := losses(results, variant):
                level = statistics.mean(pair[number] for pair in found)
                axes.axhline(level, color="0.4", ls=line, label=TITLES[variant])
        axes.set(title=f"{what} data", xlabel="tokens since the switch", ylabel="validation loss, nats a token")
    shares = [share for share in REPLAY if losses(results, f"replay_{share * 100:g}")]
    for number, what in enumerate(("old", "new", "average")):
        means = [statistics.mean(one[number] for one in losses(results, f"replay_{s * 100:g}")) for s in shares]
        right.plot([share * 100 for share in shares], means, "o-", color=f"C{number}", label=what)
        if found := losses(results, "union"):
            right.axhline(statistics.mean(one[number] for one in found), color=f"C{number}", ls=":")
    right.set_xscale("symlog", linthresh=1)
    right.set_xticks([share * 100 for share in shares], [f"{share * 100:g}" for share in shares])
    right.minorticks_off()
    right.set_xlim(-0.3, 70)
    right.set(title="at the end (dotted: union from scratch)", xlabel="replay, % of every batch")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    left.set_ylim(top=left.get_ylim()[1] + 1)  # room for the legend
    left.legend(fontsize=8, ncols=2)
    middle.legend(fontsize=8)
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Print the table and draw the figure."""
    arguments = report_arguments(__doc__)
    results = read_results(arguments.study)
    print("\n".join(table(results)))
    draw(arguments.study, results, arguments.figures / "continual.png")


if __name__ == "__main__":
    main()
