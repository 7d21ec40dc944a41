"""Hyper-parameters from published laws, each with the range it was found in and its source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Range = tuple[float, float]
HALF_LIFE = (524_288, 0.95)
"""Tokens of a batch and the beta2 that goes with it: 512 sequences of 1024 (Marek et al.)."""


def step_law_lr(size: float, tokens: float) -> float:
    """Peak rate of AdamW for `size` non-embedding parameters: 1.79 N^-.713 D^.307 (Li et al., arXiv 2503.04715)."""
    return 1.79 * size**-0.713 * tokens**0.307


def step_law_batch(tokens: float) -> float:
    """Tokens of a batch: .58 D^.571 (same source)."""
    return 0.58 * tokens**0.571


def timescale(tokens_per_parameter: float) -> float:
    """Share of the run that an AdamW weight averages over, at its best: 1.084 TPP^-.527 (arXiv 2505.13738)."""
    return 1.084 * tokens_per_parameter**-0.527


def weight_decay(batch: float, lr: float, size: float, tokens: float) -> float:
    """The lambda for which B / (lr lambda D) is `timescale`; `batch` in tokens, `size` all parameters."""
    return batch / (timescale(tokens / size) * lr * tokens)


def critical_batch(tokens: float) -> float:
    """Tokens of a batch that costs 20 % more steps than a linear speed-up: 22.91 D^.47 (arXiv 2410.21676)."""
    return 22.91 * tokens**0.47


def beta2(batch: float) -> float:
    """The beta2 whose half-life in tokens is that of `HALF_LIFE` (arXiv 2507.07101)."""
    from nexa.optim.moments import beta2_for  # with torch, which the rest of this file does without

    return beta2_for(batch, half_life(*HALF_LIFE))


def half_life(batch: float, value: float) -> float:
    """Tokens after which a gradient counts half in the second moment."""
    return batch * math.log(0.5) / math.log(value)


def width_lr(lr: float, width: float, proxy: float) -> float:
    """Rate of the matrices at `width` when `lr` was best at `proxy` (muP, arXiv 2203.03466): lr / width."""
    from nexa.optim.widths import RULES as rules

    return float(lr * (width / proxy) ** rules["mup"]["hidden"].lr)


def width_weight_decay(decay: float, width: float, proxy: float) -> float:
    """Weight decay of the matrices with it: sqrt(width), so that their singular values stay (arXiv 2510.15262)."""
    from nexa.optim.widths import RULES as rules

    return float(decay * (width / proxy) ** rules["mup_root_decay"]["hidden"].decay)


@dataclass(frozen=True)
class Run:
    """What the laws read of a run; batch and tokens in tokens."""

    size: float
    """All parameters."""
    inner: float
    """Without embedding and head."""
    tokens: float
    batch: float
    sequence: float
    lr: float
    betas: tuple[float, float]
    decay: float
    width: float


@dataclass(frozen=True)
class Rule:
    """A row: which key, what the law says, what the run has, where the law was found."""

    key: str
    unit: str
    value: Callable[[Run], float]
    current: Callable[[Run], float]
    ranges: dict[str, Range]
    """Attribute of `Run` -> the range of the law's own runs."""
    source: str
    note: str


@dataclass(frozen=True)
class Suggestion:
    """A law's word on one key of one run."""

    key: str
    unit: str
    current: float
    value: float
    ranges: dict[str, Range]
    outside: list[str]
    """What of the run is outside, in words; [] inside."""
    source: str
    note: str


_STEP_LAW = {"inner": (6e7, 1e9), "tokens": (2e9, 1e11)}
RULES: list[Rule] = [
    Rule(
        "optim.lr",
        "",
        lambda run: step_law_lr(run.inner, run.tokens),
        lambda run: run.lr,
        _STEP_LAW,
        "Step Law, arXiv 2503.04715",
        "AdamW .9/.95, weight decay .1, cosine to 1e-5, 2000 steps of warm-up; others need a fit of their own",
    ),
    Rule(
        "train.global_batch_size",
        "sequences",
        lambda run: step_law_batch(run.tokens) / run.sequence,
        lambda run: run.batch / run.sequence,
        _STEP_LAW,
        "Step Law, arXiv 2503.04715",
        "sequences of 2048 there; with others the tokens of a batch stay",
    ),
    Rule(
        "optim.weight_decay",
        "",
        lambda run: weight_decay(run.batch, run.lr, run.size, run.tokens),
        lambda run: run.decay,
        {"size": (1.11e8, 3.3e9)},
        "Power Lines, arXiv 2505.13738",
        "at this run's rate and batch, for batches below the critical one; rates from muP there",
    ),
    Rule(
        "optim.betas[1]",
        "",
        lambda run: beta2(run.batch),
        lambda run: run.betas[1],
        {"size": (3e7, 1.3e9)},
        "half-life of 7.1M tokens, arXiv 2507.07101",
        "matters for batches below half a million tokens",
    ),
    Rule(
        "critical batch",
        "sequences",
        lambda run: critical_batch(run.tokens) / run.sequence,
        lambda run: run.batch / run.sequence,
        {"size": (8.5e7, 1.2e9)},
        "arXiv 2410.21676",
        "beyond it GPUs bring little: 20 % more steps than a linear speed-up; grows in a run; constant not checked",
    ),
]
"""A new law is a row here."""
WORDS = {"inner": "parameters without embeddings", "size": "parameters", "tokens": "tokens"}


def amount(value: float) -> str:
    """'4.55M', '60M', '100B'."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def suggest(run: Run, proxy_width: float | None = None) -> list[Suggestion]:
    """All rules on a run; those of width too with `proxy_width`, at which its rate and weight decay were tuned."""
    rules = RULES if proxy_width is None else [*RULES, *_width_rules(proxy_width)]
    return [_applied(rule, run) for rule in rules]


def _width_rules(proxy: float) -> list[Rule]:
    note = (
        f"tuned at width {proxy:g}; of hidden matrices, embeddings and vectors keep theirs, vectors without decay; "
        f"optim.width_rule=mup_root_decay optim.base_hidden_size={proxy:g} does it, with the head and initial weights"
    )
    return [
        Rule(
            "lr of matrices",
            "",
            lambda run: width_lr(run.lr, run.width, proxy),
            lambda run: run.lr,
            {},
            "muP, arXiv 2203.03466",
            note,
        ),
        Rule(
            "weight decay of matrices",
            "",
            lambda run: width_weight_decay(run.decay, run.width, proxy),
            lambda run: run.decay,
            {},
            "arXiv 2510.15262",
            note,
        ),
    ]


def _applied(rule: Rule, run: Run) -> Suggestion:
    outside = [
        f"{amount(getattr(run, name))} {WORDS[name]}, the law is from {amount(low)} to {amount(high)}"
        for name, (low, high) in rule.ranges.items()
        if not low <= getattr(run, name) <= high
    ]
    return Suggestion(
        rule.key, rule.unit, rule.current(run), rule.value(run), dict(rule.ranges), outside, rule.source, rule.note
    )
