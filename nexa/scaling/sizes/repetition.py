"""Scaling when data is repeated (Muennighoff et al., arXiv 2305.16264)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.optimize import minimize_scalar

from nexa.scaling.sizes.chinchilla import FLOPS_PER_TOKEN, Chinchilla

TOKEN_DECAY, PARAMETER_DECAY = 15.387756, 5.309743
"""R*_D and R*_N, fitted on C4."""
MOST_EPOCHS = 16
"""Beyond that real runs over-fit and end far above the law."""
SHORTEST = 1e-4
"""Least N of the search, over the compute-optimal one."""


def _worth(amount: float, unique: float, decay: float) -> float:
    """What `amount`, of which `unique` is new and the rest repeats it, is worth in new units."""
    repeats = max(amount / unique - 1, 0.0)
    return min(amount, unique) + unique * decay * -math.expm1(-repeats / decay)


@dataclass(frozen=True)
class Repeated:
    """A Chinchilla law where only `unique` different tokens exist."""

    law: Chinchilla
    unique: float

    def effective_tokens(self, tokens: float) -> float:
        """D': fresh tokens that are worth `tokens` of which only `unique` differ; at most 16.4 times `unique`."""
        return _worth(tokens, self.unique, TOKEN_DECAY)

    def effective_parameters(self, parameters: float, tokens: float) -> float:
        """N': parameters beyond those that the different tokens seen can feed are worth less and less."""
        fed = self.law.parameters_for(min(tokens, self.unique))
        return _worth(parameters, min(parameters, fed), PARAMETER_DECAY)

    def loss(self, parameters: float, tokens: float) -> float:
        """The law at N' and D'. Its increments over fresh data are right to about `MOST_EPOCHS` epochs."""
        return float(self.law.loss(self.effective_parameters(parameters, tokens), self.effective_tokens(tokens)))

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens, epochs included, of the least loss with `flops` = 6 N D."""
        budget = flops / FLOPS_PER_TOKEN
        middle = math.log(self.law.optimum(flops)[0])

        def at(log_size: float) -> float:
            size = math.exp(log_size)
            return self.loss(size, budget / size)

        bounds = (middle + math.log(SHORTEST), middle - math.log(SHORTEST))
        size = math.exp(minimize_scalar(at, bounds=bounds, method="bounded", options={"xatol": 1e-7}).x)
        return size, budget / size
