"""How a rule between keys is written and registered; the rules are in `checks` and `norm_checks`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nexa.config.fields import shorten
from nexa.config.limits import value_of
from nexa.config.schema import Config

Rule = Callable[[Config, int | None], Iterator[str]]


@dataclass(frozen=True)
class Check:
    """A rule and the keys it reads; it is skipped when one of them is already known to be wrong."""

    keys: tuple[str, ...]
    rule: Rule


CHECKS: list[Check] = []


def reads(*keys: str) -> Callable[[Rule], Rule]:
    """Register a rule with the keys that it reads."""

    def register(rule: Rule) -> Rule:
        CHECKS.append(Check(keys, rule))
        return rule

    return register


def settings(cfg: Config, *names: str) -> str:
    """`a=1, b=2` for messages."""
    return ", ".join(f"{name}={shorten(value_of(cfg, name))}" for name in names)


def multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value`: `48 or 64`."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)
