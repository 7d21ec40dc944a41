"""The gradient noise scale of a run: how large a batch can be before its gradient is more signal than noise.

McCandlish et al. (arXiv 1812.06162): B_simple = tr(Sigma) / |G|^2, with G the true gradient and Sigma the covariance of
the gradient of one token. From the gradients g_i = u_i / S of the micro-batches of a step, where u_i is the gradient of
the summed loss of n_i tokens and S = sum_i n_i, two sums have known means (appendix A.1, here for micro-batches of
unequal sizes):

    E sum_i |u_i|^2 / S = |G|^2 sum_i n_i^2 / S + tr(Sigma),     E S |sum_i u_i / S|^2 = S |G|^2 + tr(Sigma),

which gives both numbers without bias. Their ratio is biased and noisy: it is taken of their averages over measurements.
Tokens of a sequence are not independent, so that Sigma is what sequences vary by, for each token of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEMORY = 0.9
"""Weight of the past in the mean over measurements: the last ten count most."""
SQUARE, VARIANCE, SCALE = "gradient_square", "gradient_variance", "gradient_noise_scale"
"""Keys of rows: |G|^2, tr(Sigma) of one token, B_simple in tokens."""


def unbiased(micro_squares: float, whole_square: float, tokens: Sequence[float]) -> tuple[float, float]:
    """(|G|^2, tr(Sigma) of a token), without bias; the first may be negative.

    micro_squares: sum_i |g_i|^2 of the micro-batches' shares g_i of the whole gradient. whole_square: |sum_i g_i|^2.
    tokens: those that each micro-batch was scored on; at least two must have some.
    """
    total = sum(tokens)
    share = sum(count**2 for count in tokens) / total
    small, large = micro_squares * total, whole_square * total
    square = (large - small) / (total - share)
    return square, small - square * share


def measured(micro_squares: float, whole_square: float, tokens: Sequence[float]) -> dict[str, float]:
    """`unbiased` as keys of a row; nothing where fewer than two micro-batches have scored tokens."""
    if sum(count > 0 for count in tokens) < 2:
        return {}
    return dict(zip((SQUARE, VARIANCE), unbiased(micro_squares, whole_square, tokens), strict=True))


@dataclass
class NoiseScale:
    """Exponential means of both numbers, at first too small by the same factor; their ratio is the noise scale."""

    square: float = 0.0
    variance: float = 0.0

    def add(self, square: float, variance: float) -> None:
        """Take in a measurement, from `unbiased`."""
        self.square = MEMORY * self.square + (1 - MEMORY) * square
        self.variance = MEMORY * self.variance + (1 - MEMORY) * variance

    @property
    def tokens(self) -> float | None:
        """B_simple; None while the mean of |G|^2 or of the variance is not above 0, which says: measure more often."""
        return self.variance / self.square if self.square > 0 and self.variance > 0 else None
