"""What many machines cost: waiting for the slowest of them, and failures.

A checkpoint that holds training up for d seconds, taken every t, loses d/(t + d) of the time; a failure loses the work
since the last one and the restart R. With failures that come at random, M seconds apart on average, the best t is about
sqrt(2 d M) (Young, Commun. ACM 17(9), 1974); Daly (Future Gener. Comput. Syst. 22, 2006) gives more terms (equation
37) and the whole time (equation 20).
"""

from __future__ import annotations

import functools
import math

GPU_HOURS_PER_FAILURE = 54 * 24 * 16384 / 419
"""419 unexpected interruptions in 54 days of 16,384 H100: The Llama 3 Herd of Models, arXiv 2407.21783, 3.3.4."""


@functools.cache
def expected_maximum(count: int) -> float:
    """Mean of the largest of `count` independent standard normal numbers.

    The integral of 1 - F(x)^n over positive x less that of F(x)^n over negative x, by the trapezoidal rule.
    """
    if count == 1:
        return 0.0
    step, total = 1 / 256, 0.0
    for index in range(-10 * 256, 10 * 256 + 1):
        x = index * step
        below = math.exp(count * math.log1p(-0.5 * math.erfc(x / math.sqrt(2)))) if x > -8 else 0.0
        total += ((1 - below) if x > 0 else -below if x < 0 else 0.5 * (1 - below) - 0.5 * below) * step
    return total


def time_between_failures(gpus: int, gpus_per_node: int, node_hours: float) -> float:
    """Seconds between failures of a job: any of its nodes ends it. node_hours: mean time between failures of a node."""
    return node_hours * 3600 / math.ceil(gpus / gpus_per_node)


def young(checkpoint: float, between: float) -> float:
    """Seconds of work between checkpoints by Young's formula."""
    return math.sqrt(2 * checkpoint * between)


def daly(checkpoint: float, between: float) -> float:
    """Seconds of work between checkpoints that waste least, Daly's equation 37.

    checkpoint: seconds that one holds training up; between: mean seconds between failures.
    """
    if checkpoint >= 2 * between:
        return between
    ratio = checkpoint / (2 * between)
    return young(checkpoint, between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint


def goodput(interval: float, checkpoint: float, restart: float, between: float) -> float:
    """Share of the time in which training goes forward, from Daly's equation 20.

    interval: seconds of work between checkpoints; checkpoint: seconds that one holds it up; restart: seconds from a
    failure to the next step; between: mean seconds between failures, which also come while restarting. 0 when
    failures come so fast that nothing gets done.
    """
    exponent = (interval + checkpoint) / between
    if exponent + restart / between > 700:  # exp overflows
        return 0.0
    return interval / (between * math.exp(restart / between) * math.expm1(exponent))
