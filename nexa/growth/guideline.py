"""When to grow, and by how much. Pure functions; need nothing.

The law of G_stack (arXiv 2405.15319, section 4): log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74, where d is tokens of
the base, N the parameters of the grown model, D its tokens and C = 6 N D. Its d falls as C grows and explodes for
small C (20 B tokens of a 1.1B model would need a base of 21 B), so it holds only where it was fitted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LOWEST_FLOPS = 10**20.5
"""C below which the law is not used."""
LARGEST_SHARE = 0.5
"""Share of D above which what the law says is no plan."""
RULE_SHARE = 0.1
"""Of D, where the law does not hold: about what it says for 1.1B parameters and 100B tokens, its smallest case."""
FACTOR = 4
"""Of depth; 2 to 4 were best."""
PUBLISHED_SPEEDUPS = {"410M, 750B tokens": 0.531, "1.1B, 100B": 0.491, "3B, 240B": 0.545, "7B, 194B": 0.546}
"""D_scratch / D_grown - 1 at equal loss; whether base tokens are counted is not said."""


@dataclass(frozen=True)
class Timing:
    """tokens: of the base. rule: where the number comes from, for people. published: whether it is the law's."""

    tokens: int
    rule: str
    published: bool


def law(parameters: float, tokens: float) -> float:
    """d of the law for N = `parameters` and D = `tokens`, whether it holds there or not."""
    flops = math.log10(6 * parameters * tokens)
    return float(10 ** (0.88 * math.log10(parameters) + 163.27 / flops - 5.74))


def timing(parameters: float, tokens: float) -> Timing:
    """Tokens of the base for a grown model of so many parameters and a run of so many tokens."""
    flops = 6 * parameters * tokens
    if flops < LOWEST_FLOPS:
        why = f"C = {flops:.2g} FLOPs is below {LOWEST_FLOPS:.2g}, where the law of arXiv 2405.15319 explodes"
    elif (found := law(parameters, tokens)) > LARGEST_SHARE * tokens:
        why = f"the law of arXiv 2405.15319 says {found / tokens:.0%}, which is no base"
    else:
        return Timing(round(found), f"{found / tokens:.1%} of the tokens by the law of arXiv 2405.15319", True)
    return Timing(math.ceil(RULE_SHARE * tokens), f"{RULE_SHARE:.0%} of the tokens by rule of thumb: {why}", False)
