"""What the residual stream looks like from block to block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nexa.diagnostics.base import Measure, Part, Seen, Totals, Values
from nexa.model.decoder import Decoder

MASSIVE = 100.0
MASSIVE_RATIO = 1000.0
"""An activation is massive above MASSIVE and at least MASSIVE_RATIO times its sequence's median (Sun et al. 2024,
arXiv 2402.17762, section 2)."""
ANGLE_ELEMENTS = 1 << 23
"""fp64 numbers of the streams that exist at once while angles are taken."""
FIRST_FITTED = 2
"""The growth exponent is fitted from this stream on: the first block reads an embedding, not a sum of sublayers."""


def growth(variance: list[float]) -> tuple[float | None, float | None]:
    """(p, r^2) of the least-squares line of log Var_l over log l, Var_l = a l^p, for streams l = 2 .. L.

    variance: of streams 0 .. L. None where fewer than three of them are there or one is not positive.
    """
    points = [(math.log(number), variance[number]) for number in range(FIRST_FITTED, len(variance))]
    if len(points) < 3 or not all(math.isfinite(value) and value > 0 for _, value in points):
        return None, None
    x = torch.tensor([point[0] for point in points], dtype=torch.float64)
    y = torch.tensor([point[1] for point in points], dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    spread = y @ y
    # a stream of constant variance is explained whole by p = 0
    explained = 1.0 if float(spread) == 0 else 1 - float((y - slope * x).square().sum() / spread)
    return float(slope), explained


def _variance(h: Tensor) -> Tensor:
    """[n, d] -> [n], over features. `Tensor.var` takes ten times as long on a CPU."""
    return (h - h.mean(-1, keepdim=True)).square().mean(-1)


class Variance(Measure):
    """Variance over features and mean square of every stream, averaged over tokens; how the variance grows."""

    def __init__(self, decoder: Decoder) -> None:
        """As `Measure`."""
        super().__init__(decoder)
        self.sums = {"variance": self.zeros(self.blocks + 1), "mean_square": self.zeros(self.blocks + 1)}

    def stream(self, number: int, h: Tensor, seen: Seen) -> None:
        """Add up both."""
        self.sums["variance"][number] += _variance(h).sum(dtype=torch.float64)
        self.sums["mean_square"][number] += h.square().mean(-1).sum(dtype=torch.float64)

    def result(self, totals: Totals) -> Values:
        """`variance`, `mean_square` by stream; `growth_exponent`, `growth_r2`."""
        found = {name: (total / totals.tokens).tolist() for name, total in self.sums.items()}
        exponent, explained = growth(found["variance"])
        return {**found, "growth_exponent": exponent, "growth_r2": explained}


class Added(Measure):
    """Variance over features of what each sublayer adds to the skip path, after its output norm if it has one."""

    def __init__(self, decoder: Decoder) -> None:
        """As `Measure`."""
        super().__init__(decoder)
        self.sums = {"attention": self.zeros(self.blocks), "feed_forward": self.zeros(self.blocks)}

    def added(self, block: int, part: Part, y: Tensor, seen: Seen) -> None:
        """Add up."""
        self.sums[part][block] += _variance(y).sum(dtype=torch.float64)

    def result(self, totals: Totals) -> Values:
        """`attention_variance`, `feed_forward_variance` by block."""
        return {f"{part}_variance": (total / totals.tokens).tolist() for part, total in self.sums.items()}


class Influence(Measure):
    """Block influence 1 - mean cos(what a block reads, what it gives) (Men et al. 2024, arXiv 2403.03853)."""

    def __init__(self, decoder: Decoder) -> None:
        """As `Measure`."""
        super().__init__(decoder)
        self.sums = {"influence": self.zeros(self.blocks)}
        self._before = torch.empty(0)

    def stream(self, number: int, h: Tensor, seen: Seen) -> None:
        """Compare with the stream before: of unit vectors u and v, 1 - u.v is |u - v|^2 / 2, which cancels nothing."""
        unit = F.normalize(h, dim=-1)
        if number > 0:
            self.sums["influence"][number - 1] += (unit - self._before).square().sum(-1).sum(dtype=torch.float64) / 2
        self._before = unit

    def after(self, decoder: Decoder, seen: Seen) -> None:
        """Nothing of a batch is kept."""
        self._before = torch.empty(0)

    def result(self, totals: Totals) -> Values:
        """`influence` by block."""
        return {"influence": (self.sums["influence"] / totals.tokens).tolist()}


class Angles(Measure):
    """Angular distance arccos(cos(h_l, h_m)) / pi of all pairs of streams (Gromov et al. 2024, arXiv 2403.17887).

    `angular` is the mean over tokens (Sun et al. 2025, arXiv 2502.05795), `angular_last` that over the last token of
    each sequence, as Gromov et al. take it. Dots in fp64: near 1 the arccos turns an error of 1e-7 into 4e-4.
    """

    def __init__(self, decoder: Decoder) -> None:
        """As `Measure`."""
        super().__init__(decoder)
        size = self.blocks + 1
        self.sums = {"angular": self.zeros(size, size), "angular_last": self.zeros(size, size)}
        self._streams: list[Tensor] = []

    def stream(self, number: int, h: Tensor, seen: Seen) -> None:
        """Keep it until the batch is through."""
        self._streams.append(h)

    def after(self, decoder: Decoder, seen: Seen) -> None:
        """All pairs, some tokens at a time."""
        tokens = max(1, ANGLE_ELEMENTS // ((self.blocks + 1) * self.width))
        for pieces in zip(*(h.split(tokens) for h in self._streams), strict=True):
            self.sums["angular"] += _angles(pieces)
        ends = torch.tensor(seen.lengths, device=self.device).cumsum(0) - 1
        self.sums["angular_last"] += _angles(tuple(h[ends] for h in self._streams))
        self._streams = []

    def result(self, totals: Totals) -> Values:
        """Both [L + 1, L + 1], symmetric with a diagonal of 0."""
        counts = {"angular": totals.tokens, "angular_last": totals.sequences}
        return {name: (self.sums[name] / count).tolist() for name, count in counts.items()}


def _angles(streams: tuple[Tensor, ...]) -> Tensor:
    """[n, d] of each stream -> the sum over tokens of the angles between them, over pi."""
    unit = F.normalize(torch.stack(streams, 1).double(), dim=-1)
    angle = torch.bmm(unit, unit.transpose(1, 2)).clamp_(-1, 1).arccos_()
    return angle.sum(0).fill_diagonal_(0.0) / math.pi


class Massive(Measure):
    """The largest activations of every stream, sequence by sequence; means over sequences (arXiv 2402.17762).

    `massive_count` is how many of a sequence's |a| are above 100 and at least 1000 times its median |a|. The median of
    an even number of values is the lower of the middle two.
    """

    def __init__(self, decoder: Decoder) -> None:
        """As `Measure`."""
        super().__init__(decoder)
        size = self.blocks + 1
        self.sums = {"top": self.zeros(3, size), "median": self.zeros(size), "count": self.zeros(size)}

    def stream(self, number: int, h: Tensor, seen: Seen) -> None:
        """Each sequence by itself."""
        for sequence in h.abs().split(seen.lengths):
            values = sequence.flatten()
            median = values.median()
            self.sums["top"][:, number] += values.topk(3).values
            self.sums["median"][number] += median
            self.sums["count"][number] += ((values > MASSIVE) & (values >= MASSIVE_RATIO * median)).sum()

    def result(self, totals: Totals) -> Values:
        """`top1`, `top2`, `top3`, `median`, `massive_count` by stream."""
        first, second, third = (self.sums["top"] / totals.sequences).tolist()
        rest = {name: (self.sums[name] / totals.sequences).tolist() for name in ("median", "count")}
        return {"top1": first, "top2": second, "top3": third, "median": rest["median"], "massive_count": rest["count"]}


class Sinks(Measure):
    """Channels of the stream that are far above the others (residual sinks, arXiv 2601.22966).

    `channel_ratio` is max_j / median_j of the mean over tokens of |h_j|; `peak_ratio` the mean over tokens of
    max |h| / rms(h), `peak_ratio_max` its largest; `kurtosis` the mean over tokens of the fourth central moment over
    features by the squared variance: 3 for a Gaussian.
    """

    def __init__(self, decoder: Decoder) -> None:
        """As `Measure`."""
        super().__init__(decoder)
        size = self.blocks + 1
        self.sums = {
            "magnitude": self.zeros(size, self.width),
            "peak_ratio": self.zeros(size),
            "kurtosis": self.zeros(size),
        }
        self.peaks = {"peak_ratio": self.zeros(size)}

    def stream(self, number: int, h: Tensor, seen: Seen) -> None:
        """Add up and keep the largest. A token that is 0 everywhere counts as 0."""
        smallest = torch.finfo(h.dtype).tiny
        magnitude = h.abs()
        self.sums["magnitude"][number] += magnitude.sum(0, dtype=torch.float64)
        ratio = magnitude.amax(-1) / h.square().mean(-1).sqrt().clamp_min(smallest)
        self.sums["peak_ratio"][number] += ratio.sum(dtype=torch.float64)
        self.peaks["peak_ratio"][number] = torch.maximum(self.peaks["peak_ratio"][number], ratio.max().double())
        squared = (h - h.mean(-1, keepdim=True)).square()
        # over the variance before the square: its square would leave fp32
        relative = squared / squared.mean(-1, keepdim=True).clamp_min(smallest)
        self.sums["kurtosis"][number] += relative.square().mean(-1).sum(dtype=torch.float64)

    def result(self, totals: Totals) -> Values:
        """All by stream."""
        magnitude = self.sums["magnitude"]
        return {
            "channel_ratio": (magnitude.amax(-1) / magnitude.median(-1).values).tolist(),
            "peak_ratio": (self.sums["peak_ratio"] / totals.tokens).tolist(),
            "peak_ratio_max": self.peaks["peak_ratio"].tolist(),
            "kurtosis": (self.sums["kurtosis"] / totals.tokens).tolist(),
        }
