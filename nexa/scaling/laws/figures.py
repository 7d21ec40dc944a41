"""A figure of curves with a law's predictions and what it misses."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nexa.errors import UserError
from nexa.scaling.laws.curves import Curve
from nexa.scaling.laws.files import Fitted

COLOURS = ("#0b62b5", "#c2410c", "#0f7a4d", "#a21c7f", "#8a6100", "#5b3fc4", "#0e7490", "#b4232f")
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "nexa law",
    "text.parse_math": False,  # a $ in the name of a curve is one
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
}
FORMATS = (".svg", ".pdf", ".png")


def draw(path: str | Path, fitted: Fitted, curves: Sequence[Curve]) -> None:
    """Write the figure: rates, losses (dots) with the law (lines, bands are 95 % intervals), residuals; over steps.

    Raises:
        UserError: the name does not end in .svg, .pdf or .png, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: figures are {', '.join(FORMATS)}; pages .html")
    with _figure(fitted, curves) as figure:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def svg(fitted: Fitted, curves: Sequence[Curve]) -> str:
    """The same figure as the text of an SVG file."""
    drawn = io.StringIO()
    with _figure(fitted, curves) as figure:
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


@contextmanager
def _figure(fitted: Fitted, curves: Sequence[Curve]) -> Iterator[Any]:
    """The drawn figure, while its style holds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with matplotlib.rc_context(STYLE):
        ratios = {"height_ratios": [1, 3, 1.4]}
        figure, panels = plt.subplots(3, 1, figsize=(6.3, 6.8), sharex=True, layout="constrained", gridspec_kw=ratios)
        for number, curve in enumerate(curves):
            _curve(panels, fitted, curve, COLOURS[number % len(COLOURS)])
        for panel, label in zip(panels, ("learning rate", "loss (nats per token)", "loss - law"), strict=True):
            panel.set_ylabel(label)
        panels[0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        panels[1].set_ylim(*_window(fitted, curves))
        panels[2].axhline(0, color="#555555", linewidth=0.7)
        panels[2].set_xlabel("step")
        panels[1].legend(frameon=False, ncols=2)
        panels[1].set_title(_title(fitted), fontsize=8)
        try:
            yield figure
        finally:
            plt.close(figure)


def _curve(panels: Any, fitted: Fitted, curve: Curve, colour: str) -> None:
    """One curve in all three panels, its rows after warm-up."""
    rows = curve.fitted
    step, predicted = curve.step[rows], fitted.predict(curve)[rows]
    panels[0].plot(np.arange(curve.rates.total), curve.rates.values[:-1], color=colour, linewidth=1)
    panels[1].plot(step, predicted, color=colour, linewidth=1, label=Path(curve.file).stem)
    interval = fitted.interval(curve)
    if interval is not None:
        panels[1].fill_between(step, interval[0][rows], interval[1][rows], color=colour, alpha=0.2, linewidth=0)
    if curve.measured:
        panels[1].plot(step, curve.loss[rows], ".", color=colour, markersize=2, alpha=0.6)
        panels[2].plot(step, curve.loss[rows] - predicted, color=colour, linewidth=0.7)


def _window(fitted: Fitted, curves: Sequence[Curve]) -> tuple[float, float]:
    """Losses to show: all but the steep beginning."""
    values = []
    for curve in curves:
        late = curve.fitted & (curve.index >= curve.rates.warmup + 0.05 * (curve.rates.total - curve.rates.warmup))
        late = late if late.any() else curve.fitted
        values += [fitted.predict(curve)[late], *([curve.loss[late]] if curve.measured else [])]
    together = np.concatenate(values)
    low, high = float(together.min()), float(together.max())
    return low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9


def _title(fitted: Fitted) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in fitted.params.items())
    return f"{fitted.law.name}: {values}"
