"""Tables and figures of the placement study, from its folder.

    python -m benchmarks.studies.placements_report STUDY --data STORE --figures docs/images

Prints the tables in Markdown. Every finished run of the first seed is measured twice on the same 8,192 validation
tokens, with its initial weights and with its last checkpoint (`nexa.diagnostics`); measurements are kept in
`STUDY/diagnoses`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.studies.placements import LEARNING_RATES, SEEDS, VARIANTS
from benchmarks.studies.runner import metrics, the_loss
from data_pipeline.store import open_store
from nexa.api import build_model, load_model
from nexa.diagnostics import measure

TOKENS = 8192
ROWS = 16
MEASURES = ("variance", "gradient", "influence")
Results = dict[str, dict[str, Any]]


def name_of(variant: str, lr: float, seed: int) -> str:
    """The study's name of a run."""
    return f"{variant}_lr{lr:g}_seed{seed}"


def read_results(study: Path) -> Results:
    """What every finished run ended with, by name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted((study / "results").glob("*.json"))}


def _cell(values: list[float | None]) -> str:
    """Mean of the seeds and half their range; what diverged says so."""
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return f"{len(values) - len(found)} of {len(values)} diverged"
    spread = (max(found) - min(found)) / 2
    return f"{statistics.mean(found):.3f} ± {spread:.3f}"


def losses(results: Results, variant: str, lr: float) -> list[float | None]:
    """Final validation losses of the seeds that have ended, None for those that diverged."""
    names = [name_of(variant, lr, seed) for seed in SEEDS]
    return [the_loss(results[name]) for name in names if name in results]


def loss_table(results: Results) -> Iterator[str]:
    """Final validation loss of every variant and learning rate, best of them, and that against Pre-LN's best."""
    yield "| variant | " + " | ".join(f"lr {lr:g}" for lr in LEARNING_RATES) + " | best | against pre |"
    yield "|---" * (len(LEARNING_RATES) + 3) + "|"
    best = {}
    for variant in VARIANTS:
        cells = [losses(results, variant, lr) for lr in LEARNING_RATES]
        means = [statistics.mean(c) for c in cells if c and None not in c]  # type: ignore[type-var]
        best[variant] = min(means, default=float("nan"))
        shown = " | ".join(_cell(c) if c else "not run" for c in cells)
        yield f"| {variant} | {shown} | {best[variant]:.3f} | {best[variant] - best['pre']:+.3f} |"


def diagnose(study: Path, name: str, overrides: list[str], data: str) -> dict[str, Any]:
    """Measurements of a run's initial and final model: {"initial": values, "final": values}."""
    file = study / "diagnoses" / f"{name}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    file.parent.mkdir(exist_ok=True)
    models = {"initial": build_model(overrides), "final": load_model(study / "runs" / name)}
    found = {when: _values(model, data) for when, model in models.items()}
    file.write_text(json.dumps(found))
    return found


def _values(model: torch.nn.Module, data: str) -> dict[str, Any]:
    source = open_store(data, "validation")
    length = TOKENS // ROWS // 4
    tokens = torch.from_numpy(source.read(0, TOKENS + 1).astype("int64"))
    rows = [tokens[start : start + length + 1] for start in range(0, TOKENS, length)]
    batches = [torch.stack(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]
    inputs = [{"input_ids": b[:, :-1].contiguous(), "labels": b[:, 1:].contiguous()} for b in batches]
    return measure(model, inputs, MEASURES).as_dict()["values"]  # type: ignore[arg-type]


def draw(path: Path, panels: list[tuple[str, Callable[[Axes], None]]], label: tuple[str, str], log: bool) -> None:
    """One picture of panels side by side with common labels."""
    figure = Figure(figsize=(5.2 * len(panels), 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, fill) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        fill(axes)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label[0])
        axes.grid(alpha=0.3)
        if log:
            axes.set_yscale("log")
    first = figure.axes[0]
    first.set_ylabel(label[1])
    first.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _lines(found: dict[str, dict[str, Any]], when: str, key: str) -> Callable[[Axes], None]:
    def fill(axes: Axes) -> None:
        for variant, values in found.items():
            series = values[when][key]
            colour = f"C{list(VARIANTS).index(variant)}"
            axes.plot(range(len(series)), series, color=colour, marker=".", markersize=4, label=variant)

    return fill


def _curves(study: Path, results: Results, lr: float) -> Callable[[Axes], None]:
    def fill(axes: Axes) -> None:
        for number, variant in enumerate(VARIANTS):
            name = name_of(variant, lr, SEEDS[0])
            rows = [row for row in metrics(study / "runs" / name) if "loss" in row] if name in results else []
            axes.plot([r["tokens"] for r in rows], [r["loss"] for r in rows], color=f"C{number}", lw=1, label=variant)

    return fill


def main() -> None:
    """Print the tables and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("--data", required=True, help="the packed store it was run on")
    parser.add_argument("--figures", type=Path, required=True, help="folder for the pictures")
    arguments = parser.parse_args()
    study, results = arguments.study, read_results(arguments.study)
    print("\n".join(loss_table(results)))
    rate = LEARNING_RATES[-1]
    names = {variant: name_of(variant, rate, SEEDS[0]) for variant in VARIANTS}
    ended = {v: name for v, name in names.items() if name in results and not results[name]["diverged"]}
    found = {v: diagnose(study, name, results[name]["overrides"], arguments.data) for v, name in ended.items()}
    print(f"\n| variant, lr {rate:g} | variance after block 1 | after the last | exponent p | initial p |", end="")
    print(" gradient norm first / last block: initial | final |\n|---|---|---|---|---|---|---|")
    for variant, values in found.items():
        last, first = values["final"], values["initial"]
        ratios = [v["gradient_norm"][0] / v["gradient_norm"][-1] for v in (first, last)]
        powers = [v["growth_exponent"] for v in (last, first)]
        print(
            f"| {variant} | {last['variance'][1]:.3g} | {last['variance'][-1]:.3g} | "
            + " | ".join("–" if p is None else f"{p:.2f}" for p in powers)
            + f" | {ratios[0]:.2f} | {ratios[1]:.2f} |"
        )
    curves = [(f"learning rate {lr:g}", _curves(study, results, lr)) for lr in LEARNING_RATES]
    draw(arguments.figures / "placements_loss.png", curves, ("training tokens", "training loss, nats a token"), False)
    for name, key, label in (
        ("variance", "variance", ("stream: 0 the embedding, l after block l", "variance over features")),
        ("gradients", "gradient_norm", ("block", "norm of the gradient of the mean loss")),
    ):
        panels = [(f"{when} weights", _lines(found, when, key)) for when in ("initial", "final")]
        draw(arguments.figures / f"placements_{name}.png", panels, label, True)


if __name__ == "__main__":
    main()
