"""What a rule between keys is, and how a file of rules registers its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nexa.config.schema import Config

Rule = Callable[[Config, int | None], Iterator[str]]


@dataclass(frozen=True)
class Check:
    """A rule and the keys it reads; it is skipped when one of them is already known to be wrong."""

    keys: tuple[str, ...]
    rule: Rule


def reads(checks: list[Check], *keys: str) -> Callable[[Rule], Rule]:
    """Register a rule in `checks` with the keys that it reads."""

    def register(rule: Rule) -> Rule:
        checks.append(Check(keys, rule))
        return rule

    return register


def multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value`: `48 or 64`."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)
