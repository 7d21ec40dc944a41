"""A ladder: smaller and shorter versions of a run, from which its loss is predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from nexa.config import check, compose
from nexa.config.schema import Config, ModelConfig
from nexa.errors import ConfigError, UserError
from nexa.scaling.hyper import step_law_batch, step_law_lr
from nexa.scaling.sizes.runs import describe

FEED_FORWARD = 8
"""Its width is a multiple of this."""


def smaller(model: ModelConfig, share: float) -> ModelConfig:
    """The model with about this share of its heads and blocks; the size of a head and the other proportions stay."""
    heads = max(1, round(model.num_attention_heads * share))
    head = model.hidden_size // model.num_attention_heads
    shared = model.num_attention_heads // (model.num_key_value_heads or model.num_attention_heads)
    groups = next(count for count in range(min(shared, heads), 0, -1) if heads % count == 0)
    ratio = model.intermediate_size / model.hidden_size
    return dataclasses.replace(
        model,
        hidden_size=heads * head,
        intermediate_size=max(1, round(ratio * heads * head / FEED_FORWARD)) * FEED_FORWARD,
        num_hidden_layers=max(1, round(model.num_hidden_layers * share)),
        num_attention_heads=heads,
        num_key_value_heads=heads // groups if model.num_key_value_heads else None,
    )


@dataclass(frozen=True)
class Rung:
    """A run of the ladder: its overrides and what they make."""

    words: list[str]
    cfg: Config


def plan(
    overrides: Sequence[str], shares: Sequence[float], tokens_per_parameter: Sequence[float], name: str
) -> tuple[Config, list[Rung]]:
    """The large run, and every run of its ladder.

    Rate and batch follow the exponents of Step Law from those of the large run, the warm-up its share of the steps.

    Raises:
        ConfigError: the large run is wrong, or one of the small ones.
        UserError: a share outside (0, 1], tokens per parameter that are not positive, or a large run that grows.
    """
    wrong = [share for share in shares if not 0 < share <= 1] + [x for x in tokens_per_parameter if not x > 0]
    if wrong:
        raise UserError(f"--shares, --tokens-per-parameter: {wrong[0]:g}; shares are in (0, 1], tokens above 0")
    base = compose(list(overrides))
    problems = check(base)
    if problems:
        raise ConfigError(problems)
    if base.growth.stages:
        raise UserError(
            "growth.stages: a ladder is of runs of one size each; predict a run that grows from rungs that do not, by "
            "its average parameters (nexa plan prints them)"
        )
    found = []
    for share in shares:
        for ratio in tokens_per_parameter:
            words = [*overrides, *_changes(base, share, ratio, f"{name}_{share:g}_{ratio:g}")]
            cfg = compose(words)
            if problems := check(cfg):
                raise ConfigError(problems)
            found.append(Rung(words, cfg))
    return base, found


def _changes(base: Config, share: float, ratio: float, name: str) -> list[str]:
    """What one run sets beside the large run's overrides."""
    model = smaller(base.model, share)
    large, small = describe(base), describe(dataclasses.replace(base, model=model))
    tokens = ratio * small.size
    batch = base.train.global_batch_size * step_law_batch(tokens) / step_law_batch(large.tokens)
    micro = base.train.micro_batch_size
    sequences = max(1, round(batch / micro)) * micro
    step_tokens = sequences * base.data.sequence_length
    steps = max(1, round(tokens / step_tokens))
    # a rule of width gives the rate of each size by itself
    inner = small.inner if base.optim.width_rule == "none" else large.inner
    lr = base.optim.lr * step_law_lr(inner, tokens) / step_law_lr(large.inner, large.tokens)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    changed = [name for name in names if getattr(model, name) != getattr(base.model, name)]
    return [
        f"run.name={name}",
        *(f"model.{key}={getattr(model, key)}" for key in changed),
        f"train.steps={steps}" if base.train.tokens is None else f"train.tokens={steps * step_tokens}",
        f"train.global_batch_size={sequences}",
        f"optim.lr={lr:.3g}",
        f"schedule.warmup_steps={round(base.schedule.warmup_steps * steps / base.total_steps)}",
    ]
