"""How fast AdamW forgets, in tokens: the rule of small batches."""

from __future__ import annotations

from nexa.config.schema import Config

MOST_BETA2 = 0.999999
"""Beyond, the average is longer than any run and its bias correction loses digits in fp32."""


def beta2_for(tokens: float, half_life: float) -> float:
    """Decay of the second moment for steps of so many tokens when a gradient counts half after `half_life` tokens:
    (1/2)^(tokens / half_life) (Marek et al., Small Batch Size Training, arXiv 2507.07101)."""
    return float(min(0.5 ** (tokens / half_life), MOST_BETA2))


def betas_of(cfg: Config) -> tuple[float, float]:
    """Decay of both moments, with the second from `optim.beta2_half_life_tokens` where that is given."""
    optim = cfg.optim
    if optim.beta2_half_life_tokens is None:
        first, second = optim.betas
        return first, second
    tokens = cfg.train.global_batch_size * cfg.data.sequence_length
    return optim.betas[0], beta2_for(tokens, optim.beta2_half_life_tokens)
