"""The loss curve as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from nexa.train.hook import Hook

if TYPE_CHECKING:
    from nexa.train.loop import Trainer


def read_rows(metrics: Path) -> list[dict[str, float]]:
    """All rows of a metrics.jsonl."""
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def plot_loss(metrics: Path, figure: Path, vocab_size: int) -> None:
    """Training and validation loss over tokens, with the loss of a uniform guess, to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in read_rows(metrics) if row.get("loss") is not None]
    canvas = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    axes.axhline(math.log(vocab_size), color="0.6", linestyle=":", label=f"uniform guess, ln {vocab_size}")
    axes.plot([r["tokens"] for r in rows], [r["loss"] for r in rows], color="tab:blue", linewidth=1, label="training")
    keys = sorted({key for row in rows for key in row if key.startswith("val/") and key.endswith("/loss")})
    for number, key in enumerate(keys):
        points = [(r["tokens"], r[key]) for r in rows if r.get(key) is not None]
        name = key.removeprefix("val/").removesuffix("/loss")
        axes.plot(*zip(*points, strict=True), "o-", color=f"C{number + 1}", markersize=4, label=f"validation: {name}")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(figure)


class PlotHook(Hook):
    """Draws figures/loss.png when the run ends."""

    def __init__(self, run_dir: Path) -> None:
        self._dir = run_dir

    def end(self, trainer: Trainer) -> None:
        """Draw from metrics.jsonl, so that the whole run is in it, not just this launch."""
        if not trainer.topology.is_main:
            return
        figure = self._dir / "figures" / "loss.png"
        plot_loss(self._dir / "metrics.jsonl", figure, trainer.config.model.vocab_size)
        print(f"loss curve: {figure}", flush=True)
