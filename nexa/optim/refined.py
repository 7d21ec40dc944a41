"""A learning-rate schedule from the gradient norms of a finished run (Defazio et al. 2023, arXiv 2310.07831).

Algorithm 1 of the paper: smooth the norms by a median filter over a tenth of the run; with weights w_t = 1 / G_t^2 the
rate is eta_t = w_t (w_{t+1} + ... + w_T), divided by the largest. Large norms at the start become a warm-up, the sum
becomes a decay to 0. This is its form for SGD. For Adam the paper takes 1 / G_t of l1 norms; nexa logs the l2 norm of
the whole gradient, before clipping, so the l2 form is used for every optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nexa.errors import UserError

SMOOTHING = 0.1
"""Width of the median filter over the length of the run (the paper's tau)."""
LARGEST_GAP = SMOOTHING / 2
"""Longest stretch without a norm, over the length of the run: half of the filter."""
GRID = 4000
"""Longer runs are computed on so many equal parts."""
MOST_POINTS = 200
"""Straight lines of the resulting schedule."""


def smoothed(norms: np.ndarray) -> np.ndarray:
    """Running median over SMOOTHING of the length (an odd number of values); same shape.

    The first value goes on before the start, the end is mirrored, as in the paper's algorithm.
    """
    half = int(SMOOTHING * len(norms)) // 2
    padded = np.pad(np.pad(norms, (half, 0), mode="edge"), (0, half), mode="reflect") if half else norms
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=-1)


def refined_ratios(norms: np.ndarray) -> np.ndarray:
    """Rates over the peak at the steps 0..T from gradient norms [T] > 0 of the updates; [T + 1], the last is 0.

    Step T, one past the last update, has the norm of the last one: equal norms give 1 - s/T, which is `linear`
    to zero (Theorem 1 of the paper).
    """
    weights = (norms.min() / np.append(norms, norms[-1])) ** 2  # at most 1: neither overflows nor depends on the unit
    rates = weights * np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)
    return rates / rates.max()


def refined_points(steps: Sequence[int], norms: Sequence[float], total: int) -> tuple[list[int], list[float]]:
    """Points (step, rate over peak) of the refined schedule of a run of `total` steps, at most MOST_POINTS + 1.

    steps, norms: increasing numbers of updates from 1, and the norm of each one's gradient. Between them norms are
    interpolated. The points are at increasing steps from 0 to `total`, between 0 and 1, the largest 1, the last 0.

    Raises UserError for too few norms, a gap longer than half of the filter, and a norm that is not positive.
    """
    needed = min(total, round(1 / LARGEST_GAP))
    if total < 2 or len(steps) < needed:
        raise UserError(f"{len(steps)} steps have a grad_norm; a refined schedule needs at least {max(2, needed)}")
    ends = np.array([0, *steps, total + 1])
    widest = int(np.argmax(np.diff(ends)))
    if ends[widest + 1] - ends[widest] > LARGEST_GAP * total + 1:
        raise UserError(
            f"no grad_norm between steps {ends[widest]} and {min(ends[widest + 1], total)} of {total}: rows are missing"
        )
    values = np.asarray(norms, np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        raise UserError("a grad_norm is not a positive number")
    parts = min(total, GRID)
    at = np.arange(parts) * (total / parts)
    ratios = refined_ratios(smoothed(np.interp(at, np.asarray(steps) - 1, values)))
    kept = np.unique(np.round(np.linspace(0, parts, min(parts, MOST_POINTS) + 1)).astype(int))
    points = np.round(kept * (total / parts)).astype(int).tolist()
    rates = ratios[kept] / ratios[kept].max()
    return points, [float(f"{rate:.6g}") for rate in rates]
