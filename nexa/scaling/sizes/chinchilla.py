"""L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., arXiv 2203.15556), its optimum and its fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import softmax

from nexa.errors import UserError

Floats = NDArray[np.float64]
FLOPS_PER_TOKEN = 6
"""Of training, per parameter: C = 6 N D."""
DELTA = 1e-3
"""Of the Huber loss, on log loss (Hoffmann et al.; Besiroglu et al., arXiv 2404.10102)."""
INTERVAL = (2.5, 97.5)
STARTS = list(itertools.product((0.0, 5.0, 10.0, 15.0), (0.0, 5.0, 10.0, 15.0), (-0.5, 0.5), (0.3, 0.8), (0.3, 0.8)))
"""log A, log B, log E, alpha, beta."""
FINISHED = 8
"""How many of the starts, the best ones, are minimised."""


@dataclass(frozen=True)
class Chinchilla:
    """Loss in nats per token of N parameters trained on D tokens, each seen once."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float | Floats, tokens: float | Floats) -> float | Floats:
        """The law. For a model that grew or was pruned `parameters` is `average_parameters`."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    @property
    def balance(self) -> float:
        """G = (alpha A / (beta B))^(1 / (alpha + beta))."""
        return float((self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta)))

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens of the least loss with `flops` = 6 N D."""
        budget, whole = flops / FLOPS_PER_TOKEN, self.alpha + self.beta
        return self.balance * budget ** (self.beta / whole), budget ** (self.alpha / whole) / self.balance

    def parameters_for(self, tokens: float) -> float:
        """The N whose compute-optimal number of tokens is `tokens`."""
        return self.balance * (tokens * self.balance) ** (self.beta / self.alpha)


PUBLISHED: dict[str, tuple[Chinchilla, str]] = {
    "hoffmann": (Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28), "Hoffmann et al. 2022 (MassiveText), rounded as printed"),
    "besiroglu": (
        Chinchilla(1.8172, 482.01, 2085.43, 0.3478, 0.3658),
        "Besiroglu et al. 2024 (arXiv 2404.10102), refit",
    ),
    "c4": (
        Chinchilla(math.exp(0.6254804), math.exp(6.255414), math.exp(7.3049974), 0.3526596, 0.3526596),
        "Muennighoff et al. 2023 (arXiv 2305.16264), C4",
    ),
}
"""Name -> law and source. Losses with other tokenizers and data do not compare: use differences, or a fit of yours."""


def average_parameters(parts: Sequence[tuple[float, float]]) -> float:
    """N averaged over training tokens, of (parameters, tokens) of each part of a run that grew or was pruned.

    The N that belongs into the law, and into C = 6 N D (Jin et al., ICLR 2025: shown for pruning of 58M to 468M
    parameters; for growth a hypothesis).
    """
    tokens = sum(part[1] for part in parts)
    return sum(size * count for size, count in parts) / tokens


@dataclass(frozen=True)
class Fit:
    """A law, the objective it reached, and what replicates of the runs gave instead."""

    law: Chinchilla
    objective: float
    samples: list[Chinchilla] = field(default_factory=list)

    def interval(self, values: Sequence[float]) -> list[float]:
        """95 % interval of values of the samples."""
        return [float(value) for value in np.percentile(values, INTERVAL)]


def fewest(tied: bool) -> int:
    """How many runs a fit needs."""
    return 5 if tied else 6


def fit(
    parameters: Floats, tokens: Floats, loss: Floats, *, tied: bool = False, bootstrap: int = 0, seed: int = 0
) -> Fit:
    """The law on runs [n] of different sizes and lengths: Huber loss of log L, from many starts.

    `tied`: alpha = beta, which is the law of over-training of Gadre et al. (arXiv 2403.08540): with M = D / N it reads
    E + (a M^eta + b M^-eta) C^-eta, eta = alpha / 2. `bootstrap`: replicates with runs drawn anew.

    Raises:
        UserError: fewer runs than parameters, or all of one size or of one length.
    """
    least = fewest(tied)
    if len(loss) < least:
        raise UserError(f"{len(loss)} runs for {least - 1} parameters of the law; give at least {least}")
    for name, values in (("parameters", parameters), ("tokens", tokens)):
        if len(np.unique(values)) < 2:
            raise UserError(f"all runs have {name}={values[0]:g}; the law needs runs with different {name}")
    logs = (np.log(parameters), np.log(tokens), np.log(loss))
    starts = sorted((_objective(np.array(start), *logs, tied)[0], start) for start in STARTS)
    found = [_minimise(np.array(start), logs, tied) for _, start in starts[:FINISHED]]
    best, theta = min(found, key=lambda each: each[0])
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(bootstrap):
        drawn = generator.integers(0, len(loss), len(loss))
        samples.append(_law(_minimise(theta, tuple(values[drawn] for values in logs), tied)[1], tied))
    return Fit(_law(theta, tied), best, samples)


def _law(theta: Floats, tied: bool) -> Chinchilla:
    a, b, e, alpha, beta = (float(value) for value in theta)
    return Chinchilla(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), alpha, alpha if tied else beta)


def _minimise(start: Floats, logs: Sequence[Floats], tied: bool) -> tuple[float, Floats]:
    bounds = [(-5, 40), (-5, 40), (-5, 3), (0.01, 3), (0.01, 3)]
    options = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-9}
    found = minimize(_objective, start, args=(*logs, tied), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return float(found.fun), found.x


def _objective(theta: Floats, sizes: Floats, lengths: Floats, losses: Floats, tied: bool) -> tuple[float, Floats]:
    """Sum of Huber losses over DELTA and its gradient; theta: log A, log B, log E, alpha, beta."""
    a, b, e, alpha, beta = theta
    beta = alpha if tied else beta
    terms = np.stack([a - alpha * sizes, b - beta * lengths, np.full_like(sizes, e)])
    shares = softmax(terms, axis=0)
    residuals = np.logaddexp.reduce(terms, axis=0) - losses
    size = np.abs(residuals)
    value = np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA)).sum() / DELTA
    pull = np.clip(residuals, -DELTA, DELTA) / DELTA
    to_sizes, to_lengths = -(pull * shares[0]) @ sizes, -(pull * shares[1]) @ lengths
    exponents = [to_sizes + to_lengths, 0.0] if tied else [to_sizes, to_lengths]
    return float(value), np.array([*(shares @ pull), *exponents])
