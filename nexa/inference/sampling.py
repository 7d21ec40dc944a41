"""One id from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nexa.errors import UserError

SEEDS = 2**63


@dataclass(frozen=True)
class Sampling:
    """How to draw. Raises UserError naming the option of `nexa generate` whose value cannot be."""

    max_new_tokens: int
    temperature: float = 0.8
    """Divides the logits."""
    top_p: float = 0.95
    """Share of the probability to draw from, after `top_k`."""
    top_k: int = 0
    """Number of tokens to draw from; 0: all."""
    greedy: bool = False
    """Take the likeliest token and draw nothing."""
    seed: int = 0
    """Of the first prompt; prompt i of a list, counted from 0, has seed + i."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature:g}: must be above 0; --greedy takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must be at least 1, or 0 for all tokens")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"--seed {self.seed}: must be from 0 to 2^63 - 1")

    def generator(self, prompt: int) -> torch.Generator:
        """The source of prompt number `prompt`'s draws: its own, so that the other prompts do not matter."""
        return torch.Generator().manual_seed((self.seed + prompt) % SEEDS)


def likeliest(logits: Tensor, top_k: int) -> Tensor:
    """`logits` [V] with all but the `top_k` largest at -inf; 0 keeps all (Fan et al. 2018)."""
    if not 0 < top_k < logits.numel():
        return logits
    values, kept = logits.topk(top_k)
    return torch.full_like(logits, float("-inf")).index_copy(0, kept, values)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """`logits` [V] with all but the smallest set of tokens that holds `top_p` of the probability at -inf.

    The likeliest token always stays (Holtzman et al. 2020).
    """
    if top_p >= 1.0:
        return logits
    ordered, order = logits.sort(descending=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    return logits.index_fill(0, order[(before >= top_p) & (before > 0)], float("-inf"))


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from logits [V]: temperature, then top-k, then top-p. Raises UserError when they are not finite."""
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model's output is not finite: its weights are damaged or the training diverged")
    if sampling.greedy:
        return int(logits.argmax())
    kept = nucleus(likeliest(logits / sampling.temperature, sampling.top_k), sampling.top_p)
    return int(torch.multinomial(kept.softmax(-1), 1, generator=generator))
