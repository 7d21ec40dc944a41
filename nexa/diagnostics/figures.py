"""The figures of a report, as SVG whose colours the page chooses: readable in the light and in the dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Run = Mapping[str, Any]
"""One entry of `runs` in diagnosis.json."""
LIGHT = ("#0b62b5", "#c2410c", "#0f7a4d", "#a21c7f", "#8a6100", "#5b3fc4", "#0e7490", "#b4232f")
DARK = ("#6cb2f7", "#ff9d66", "#5cd39b", "#f08ad4", "#e2bb4a", "#b3a1ff", "#5fd0e6", "#ff8a91")
"""Colours of the runs on either background; after the last one they come round with another dash."""
DASHES = ("", "6 3", "2 2")
_TEXT, _GRID = "#0a0b01", "#0a0b02"
"""Stand for the page's colours inside matplotlib, as `_run_colour` does."""
MATRICES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
STREAMS = "blocks passed (0: the embedding's output)"
BLOCKS = "block"


@dataclass(frozen=True)
class Lines:
    """A quantity over blocks, a line for each run."""

    name: str
    title: str
    axis: str
    """Of the values, with the unit."""
    what: str
    """One sentence: what is measured."""
    scale: str = "log"
    over: str = STREAMS
    wide = False
    """Whether it takes the whole width of the page."""

    def draw(self, runs: Sequence[Run]) -> list[tuple[str, str]]:
        """One SVG, without a heading."""
        panels = [("", [run["values"][self.name] for run in runs])]
        return [("", _lines(self.name, panels, (self.over, self.axis), self.scale))]


@dataclass(frozen=True)
class MatrixLines:
    """Gradient norms of each of a block's matrices: a panel for each, a line for each run."""

    name: str
    title: str
    axis: str
    what: str
    wide = True

    def draw(self, runs: Sequence[Run]) -> list[tuple[str, str]]:
        """One SVG of all panels."""
        panels = []
        for title, matrix in MATRICES.items():
            names = [[f"model.layers.{i}.{matrix}.weight" for i in range(run["blocks"])] for run in runs]
            pairs = zip(runs, names, strict=True)
            panels.append((title, [[run["values"][self.name].get(name) for name in own] for run, own in pairs]))
        return [("", _lines(self.name, panels, (BLOCKS, self.axis), "log", columns=4))]


@dataclass(frozen=True)
class Heat:
    """A matrix of streams by streams for each run, all with one scale."""

    name: str
    title: str
    axis: str
    what: str
    wide = True

    def draw(self, runs: Sequence[Run]) -> list[tuple[str, str]]:
        """An SVG for each run, under its label."""
        highest = max(value or 0.0 for run in runs for row in run["values"][self.name] for value in row)
        return [
            (run["label"], _heat(f"{self.name} {number}", run["values"][self.name], self.axis, highest or 1.0))
            for number, run in enumerate(runs)
        ]


Figure = Lines | MatrixLines | Heat
FIGURES: tuple[Figure, ...] = (
    Lines(
        "variance",
        "Variance of the residual stream",
        "variance",
        "Variance over features of what leaves each block, averaged over tokens.",
    ),
    Lines(
        "mean_square",
        "Mean square of the residual stream",
        "mean square",
        "Mean over features of the squares of what leaves each block, averaged over tokens.",
    ),
    Lines(
        "attention_variance",
        "What attention adds",
        "variance",
        "Variance over features of what a block's attention adds to the skip path, after its output norm if any.",
        over=BLOCKS,
    ),
    Lines(
        "feed_forward_variance",
        "What the feed-forward adds",
        "variance",
        "The same of what a block's feed-forward adds.",
        over=BLOCKS,
    ),
    Lines(
        "influence",
        "Block influence",
        "1 - cosine",
        "One minus the cosine between what a block reads and what it gives, averaged over tokens: 0 changes nothing.",
        over=BLOCKS,
    ),
    Lines(
        "loss_increase",
        "Loss without a block",
        "loss increase (nats per token)",
        "How much the loss rises when one block is left out and no other is changed; the axis is linear below 0.01.",
        scale="symlog",
        over=BLOCKS,
    ),
    Heat(
        "angular",
        "Angular distance between streams",
        "arccos(cosine) / pi",
        "Angle between the streams after i and after j blocks over pi, averaged over tokens; all runs on one scale.",
    ),
    Lines(
        "gradient_norm",
        "Gradient by block",
        "norm of the gradient",
        "Norm of the gradient of the mean loss of all measured tokens by all parameters of a block, before clipping.",
        over=BLOCKS,
    ),
    MatrixLines(
        "gradient",
        "Gradient by matrix",
        "norm of the gradient",
        "The same by each matrix of attention (query, key, value, output) and feed-forward (gate, up, down).",
    ),
    Lines(
        "logit_max",
        "Largest attention logit",
        "largest |q k scale|",
        "Largest absolute value that a softmax of the block's attention gets, over heads, tokens and allowed pairs.",
        over=BLOCKS,
    ),
    Lines(
        "sink_share",
        "Attention on the first token",
        "share of the attention",
        "Attention that a query gives to the first token it may look at, averaged over heads and tokens.",
        scale="linear",
        over=BLOCKS,
    ),
    Lines(
        "top1",
        "Largest activation",
        "largest |a|",
        "Largest absolute value of a sequence's residual stream after each block, averaged over sequences.",
    ),
    Lines(
        "median",
        "Median activation",
        "median |a|",
        "Median absolute value of the same: massive activations are a thousand times above it.",
    ),
    Lines(
        "massive_count",
        "Massive activations",
        "number in a sequence",
        "Activations above 100 and at least 1000 times the median of their sequence, averaged over sequences.",
        scale="linear",
    ),
    Lines(
        "channel_ratio",
        "Residual sinks: largest channel",
        "largest / median channel",
        "Mean magnitude of the largest channel of the stream over that of the median channel.",
    ),
    Lines(
        "peak_ratio",
        "Residual sinks: peak of a token",
        "max |h| / rms(h)",
        "Largest absolute value of a token's stream over its root mean square, averaged over tokens.",
    ),
    Lines(
        "kurtosis",
        "Kurtosis",
        "kurtosis",
        "Fourth central moment over features by the squared variance, averaged over tokens: 3 for a Gaussian.",
    ),
)
"""Every figure of a report, in order; one is drawn when all runs have its quantity."""


def run_style(number: int) -> tuple[str, str]:
    """(CSS colour, dashes) of run `number`."""
    return f"var(--run{number % len(LIGHT)})", DASHES[number // len(LIGHT) % len(DASHES)]


def _run_colour(number: int) -> str:
    return f"#0a0c{number % len(LIGHT):02x}"


def page_colours(svg: str) -> str:
    """Put the page's colours in the place of those that stand for them."""
    names = {_TEXT: "var(--text)", _GRID: "var(--grid)"}
    names |= {_run_colour(number): f"var(--run{number})" for number in range(len(LIGHT))}
    return re.sub("#0a0[bc][0-9a-f]{2}", lambda found: names[found[0]], svg)


def _svg(name: str, size: tuple[float, float], draw: Callable[[Canvas], None]) -> str:
    """What `draw` puts on a figure of `size` inches, as an `<svg>` element without anything from elsewhere.

    name: other than that of every other picture of the page, for ids of its own.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT)
    style |= {"axes.edgecolor": _GRID, "grid.color": _GRID, "axes.spines.top": False, "axes.spines.right": False}
    text = io.StringIO()
    with mpl.rc_context(style):
        canvas = Canvas(figsize=size, layout="constrained", facecolor="none")
        FigureCanvasSVG(canvas)
        draw(canvas)
        canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    used = set(re.findall(r"#([\w-]+)", svg))
    # what nothing refers to would be there again in the next picture of the page
    svg = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)  # the page's own
    return re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", svg, count=2)


def _lines(
    name: str,
    panels: list[tuple[str, list[list[float | None]]]],
    labels: tuple[str, str],
    scale: str,
    columns: int = 1,
) -> str:
    """A panel for each (title, values of each run); labels of both axes."""
    rows = -(-len(panels) // columns)
    size = (5.4, 3.0) if columns == 1 else (2.75 * columns, 2.3 * rows)

    def draw(canvas: Canvas) -> None:
        grid = canvas.subplots(rows, columns, squeeze=False).flatten()
        for number, (axes, (title, values)) in enumerate(zip(grid, panels, strict=False)):
            _panel(axes, values, scale)
            axes.set_title(title)
            axes.set_xlabel(labels[0])
            if number % columns == 0:
                axes.set_ylabel(labels[1])
        for axes in grid[len(panels) :]:
            axes.remove()

    return _svg(name, size, draw)


def _panel(axes: Axes, values: list[list[float | None]], scale: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    for number, own in enumerate(values):
        points = [math.nan if value is None else value for value in own]
        dashes = run_style(number)[1]
        style = (0, tuple(map(float, dashes.split()))) if dashes else "-"
        axes.plot(range(len(points)), points, "o", linestyle=style, color=_run_colour(number), ms=2.6, lw=1.5)
    positive = [value for own in values for value in own if value is not None and value > 0]
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    if scale == "symlog":
        axes.set_yscale("symlog", linthresh=0.01)
        axes.yaxis.set_major_formatter(plain)
    elif scale == "log" and positive:
        narrow = max(positive) < 30 * min(positive)
        axes.set_yscale("log", subs=(2, 5) if narrow else None)
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(plain if narrow else NullFormatter())
    else:
        axes.set_ylim(0, None if positive else 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.5, linewidth=0.6)


def _heat(name: str, matrix: list[list[float | None]], axis: str, highest: float) -> str:
    from matplotlib.ticker import MaxNLocator

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for each in (axes.xaxis, axes.yaxis):
            each.set_major_locator(MaxNLocator(integer=True))
        values = [[math.nan if value is None else value for value in row] for row in matrix]
        image = axes.imshow(values, origin="lower", vmin=0, vmax=highest, cmap="viridis", interpolation="nearest")
        axes.set_xlabel("after j blocks")
        axes.set_ylabel("after i blocks")
        canvas.colorbar(image, ax=axes, label=axis, shrink=0.85)

    return _svg(name, (3.8, 3.1), draw)
