"""Configuration keys of group `optim`; see schema.py, whose conventions hold here too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

WidthRule = Literal["none", "mup", "mup_root_decay", "mup_plain_decay"]


@dataclass
class OptimConfig:
    """The optimizer."""

    name: Literal["adamw"] = "adamw"
    """Update rule."""
    lr: float = 3e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the first and second moment; of the first alone when `beta2_half_life_tokens` is given."""
    beta2_half_life_tokens: float | None = None
    """Tokens after which a gradient counts half in the second moment; gives its decay for every batch size."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices and an untied head; norms, scalars and the embedding have none unless asked.
    The two matrices of a GatedNorm are matrices."""
    decay_embeddings: bool = False
    """Decay the embedding, and so a tied head, too."""
    decay_norms: bool = False
    """Decay norm gains and other vectors too, among them the alpha and beta of SeeDNorm, which its paper decays."""
    width_rule: WidthRule = "none"
    """How rate, weight decay and initial weights of each role follow the width: a row of nexa/optim/widths.py."""
    base_hidden_size: int | None = None
    """`width_rule`: model.hidden_size at which lr, weight_decay and initialiser are meant as they stand; all other
    widths are in proportion there, heads have the size that they have here."""
