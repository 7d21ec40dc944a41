"""Loss-based reweighting of samples (Sow et al., ICLR 2025, arXiv 2502.06733): rows of a step count by their loss.

The losses l of the rows of a global batch are mapped to h in [-delta, delta], the least of them to -delta and the
greatest to delta; a strategy makes a score s of h, and w = softmax(s / r) are the weights of the rows in the loss
sum_i w_i l_i. Nothing is remembered from step to step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nexa.config.schema import ReweightConfig
from nexa.parallel.engine import Engine
from nexa.train.rows import gather_rows, own_rows

Strategy = Callable[[Tensor, float], Tensor]
"""(h in [-delta, delta], delta) -> score."""

STRATEGIES: dict[str, Strategy] = {
    "linear_upper": lambda h, delta: (h + delta).clamp_max(delta),
    "quadratic": lambda h, delta: 1 - (h / delta).square(),
    "extremes": lambda h, delta: h.abs(),
}
"""Scores by name: low losses count less; middling losses count most; both ends count most."""


def row_means(sums: Tensor, tokens: Tensor) -> Tensor:
    """Mean loss over the scored tokens of each row [B], in fp64; 0 for a row without any."""
    return sums.double() / tokens.double().clamp_min(1)


def weights(sums: Tensor, tokens: Tensor, cfg: ReweightConfig) -> Tensor:
    """Weights [B], in fp64 and of sum 1, of all rows of a global batch; a row without scored tokens has 0.

    sums, tokens [B]: summed loss and scored tokens of each row; one must have a scored token. Where all losses are
    equal all weights are. Nothing waits for the device.
    """
    means, empty = row_means(sums, tokens), tokens == 0
    least = means.masked_fill(empty, torch.inf).amin()
    span = means.masked_fill(empty, -torch.inf).amax() - least
    place = torch.where(span > 0, (means - least) / span, 0.5)  # 0 to 1
    scores = STRATEGIES[cfg.strategy](cfg.delta * (2 * place - 1), cfg.delta)
    return (scores / cfg.temperature).masked_fill(empty, -torch.inf).softmax(0)


def token_factors(row_weights: Tensor, tokens: Tensor) -> Tensor:
    """What each row's tokens count, over what they count in the plain mean over tokens, [B].

    With these, (sum over tokens of factor x loss) / (scored tokens) is sum_i w_i l_i.
    """
    return row_weights * tokens.sum() / tokens.clamp_min(1)


def row_factors(engine: Engine, batches: list[dict[str, Tensor]], tokens: Tensor, cfg: ReweightConfig) -> Tensor:
    """`token_factors` of this rank's rows in its micro-batches of a step, [A, b], by their losses as the model is now.

    tokens [A, b]: scored tokens of each row. A forward pass over all micro-batches; collective.
    """
    losses = torch.stack([engine.row_losses(batch) for batch in batches])
    sums, counts = gather_rows(losses, tokens, engine.topology)
    return own_rows(token_factors(weights(sums, counts, cfg), counts), engine.topology, tokens.shape[1])


def report(sums: Tensor, tokens: Tensor, cfg: ReweightConfig) -> dict[str, float]:
    """Metrics of the weights of a step, for the arguments of `weights`."""
    found = weights(sums, tokens, cfg)
    numbers = (found * row_means(sums, tokens)).sum(), 1 / found.square().sum(), found.amax()
    names = ("reweight/loss", "reweight/effective_samples", "reweight/max_weight")
    return dict(zip(names, torch.stack(numbers).tolist(), strict=True))
