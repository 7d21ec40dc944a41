"""What `norm.removal` goes with; `checks` registers the rule with the keys it reads."""

from __future__ import annotations

from collections.abc import Iterator

from nexa.config.schema import Config

REMOVABLE_PLACEMENTS = ("pre", "lns")
"""Placements all of whose norms stand before linear layers, which can take a constant over."""
REMOVABLE_KINDS = ("rmsnorm", "layernorm")
"""Kinds that are linear once their denominator is a constant, and whose denominator is their own."""


def removal(cfg: Config, world_size: int | None) -> Iterator[str]:
    """What `norm.removal` works with."""
    norm, order = cfg.norm, cfg.norm.removal.order
    if norm.removal.start is None:
        return
    start = f"norm.removal.start={norm.removal.start}"
    if norm.placement not in REMOVABLE_PLACEMENTS:
        yield (
            f"{start}: norm.placement={norm.placement} has norms with no linear layer behind them that could take them "
            f"over; set norm.removal.start=null, or norm.placement={' or '.join(REMOVABLE_PLACEMENTS)}"
        )
    if norm.kind not in REMOVABLE_KINDS:
        yield (
            f"{start}: norm.kind={norm.kind} is not linear behind a constant denominator; set norm.removal.start=null, "
            f"or norm.kind={' or '.join(REMOVABLE_KINDS)}"
        )
    if norm.final is False:
        yield f"{start}: norm.final=false leaves the head without a norm to remove; set norm.final=null"
    if not order or len(set(order)) < len(order):
        yield f"norm.removal.order={order}: must name one or more of feed_forward, attention and final, each once"
